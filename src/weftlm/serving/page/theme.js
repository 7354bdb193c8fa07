"use strict";
// Before the page is drawn: the colours chosen earlier, where the browser may keep them.
try {
  const chosen = localStorage.getItem("weftlm-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch { /* no storage: as the system has it */ }
