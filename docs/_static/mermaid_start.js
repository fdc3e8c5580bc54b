// Diagrams in the colours of the page, also after a change of the mode.
document.addEventListener("DOMContentLoaded", () => {
  const diagrams = [...document.querySelectorAll("pre.mermaid")].map((node) => [node, node.textContent]);
  if (!diagrams.length) return;
  const draw = () => {
    const dark = document.documentElement.dataset.theme === "dark";
    mermaid.initialize({ startOnLoad: false, theme: dark ? "dark" : "neutral" });
    for (const [node, text] of diagrams) {
      node.removeAttribute("data-processed");
      node.textContent = text;
    }
    mermaid.run({ nodes: diagrams.map(([node]) => node) });
  };
  draw();
  new MutationObserver(draw).observe(document.documentElement, { attributeFilter: ["data-theme"] });
});
