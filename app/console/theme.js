// Sets light or dark before the first paint, if one was chosen here. Otherwise the style sheet follows the system.
"use strict";
(() => {
  const stored = () => {
    try {
      return localStorage.getItem("neuronlens-theme");
    } catch {
      return null; // storage is disabled
    }
  };
  const chosen = stored();
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
