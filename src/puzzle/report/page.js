// Draws every figure into its place. Nothing is loaded: the data is in this page.
const figures = JSON.parse(document.getElementById("figures").textContent);
// On a touch screen a drag scrolls the page; with a mouse it zooms in, and a double click goes back.
const dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";
for (const [id, figure] of Object.entries(figures)) {
  Plotly.newPlot(id, figure.data, { ...figure.layout, dragmode }, { responsive: true, displayModeBar: false });
}
