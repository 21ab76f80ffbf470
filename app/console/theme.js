// Light or dark, before the first paint: what was chosen here, else what the system prefers.
"use strict";
(() => {
  const kept = () => {
    try {
      return localStorage.getItem("neuronlens-theme");
    } catch {
      return null; // a browser may forbid it
    }
  };
  const chosen = kept();
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
