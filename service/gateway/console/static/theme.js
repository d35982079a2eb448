// Before anything is drawn: the theme that was chosen, or the system's.
(function () {
  "use strict";
  var chosen = null;
  try { chosen = localStorage.getItem("coe-theme"); } catch (e) { /* storage is forbidden here */ }
  if (chosen !== "dark" && chosen !== "light") {
    chosen = matchMedia("(prefers-color-scheme: light)").matches ? "light" : "dark";
  }
  document.documentElement.dataset.theme = chosen;
})();
