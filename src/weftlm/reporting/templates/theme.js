"use strict";
// Light or dark: as the system has it, or as chosen with the button #theme, kept where the browser allows it.
(() => {
  const root = document.documentElement, system = window.matchMedia("(prefers-color-scheme: dark)");
  try {
    const chosen = localStorage.getItem("weftlm-theme");
    if (chosen === "light" || chosen === "dark") root.dataset.theme = chosen;
  } catch { /* no storage */ }
  const theme = () => root.dataset.theme ?? (system.matches ? "dark" : "light");

  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    function label() {
      const next = theme() === "dark" ? "light" : "dark";
      button.textContent = next === "dark" ? "Dark" : "Light";
      button.setAttribute("aria-label", `Switch to ${next} colours`);
    }
    button.hidden = false;
    button.addEventListener("click", () => {
      const next = theme() === "dark" ? "light" : "dark";
      if ((next === "dark") === system.matches) delete root.dataset.theme;
      else root.dataset.theme = next;
      try {
        localStorage.setItem("weftlm-theme", root.dataset.theme ?? "");
      } catch { /* not kept */ }
      label();
    });
    system.addEventListener("change", label);
    label();
  });
})();
