// The button that switches between light, dark and what the system says.
{
  const theme = document.getElementById("theme"), themes = ["system", "light", "dark"];
  theme.addEventListener("click", () => {
    const root = document.documentElement;
    const next = themes[(themes.indexOf(root.dataset.theme || "system") + 1) % themes.length];
    if (next === "system") delete root.dataset.theme; else root.dataset.theme = next;
    theme.textContent = `Theme: ${next}`;
  });
}
