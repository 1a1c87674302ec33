"use strict";
// The theme follows the system until the button is pressed; the choice is kept where the browser allows it.
(() => {
  const button = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try { chosen = localStorage.getItem("scgpt_batch-theme"); } catch { /* no storage for local files */ }
  const isDark = () => (chosen ? chosen === "dark" : dark.matches);
  const apply = () => {
    if (chosen === "dark" || chosen === "light") document.documentElement.style.colorScheme = chosen;
    button.textContent = isDark() ? "Light theme" : "Dark theme";
    document.dispatchEvent(new Event("themechange"));
  };
  button.hidden = false;
  button.addEventListener("click", () => {
    chosen = isDark() ? "light" : "dark";
    try { localStorage.setItem("scgpt_batch-theme", chosen); } catch { /* as above */ }
    apply();
  });
  dark.addEventListener("change", apply);
  apply();
})();
