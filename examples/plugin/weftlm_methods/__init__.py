"""A mixture policy and a router for weftlm, as a package of its own."""
