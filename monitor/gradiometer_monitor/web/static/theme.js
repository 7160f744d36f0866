// Runs before the first paint: a page that is to be dark must not flash white.
(() => {
  const chosen = localStorage.getItem("gradiometer-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
