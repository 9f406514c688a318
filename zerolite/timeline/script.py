"""Style and script of the page. The script only adds to what is drawn already: values under the pointer, and toggles."""

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;background:#fff;max-width:1120px;margin:24px auto;padding:0 16px}
h1{font-size:22px}h2{font-size:17px;margin:26px 0 6px}
.peak{background:#f6f2e9;border-left:4px solid #c44e52;padding:10px 14px}
.note{color:#555;font-size:13px}svg{width:100%;height:auto;display:block}
svg text{font:12px system-ui,sans-serif;fill:#333}svg text.small{font-size:10.5px}
.grid{stroke:#ddd}.rest{stroke:#222;stroke-dasharray:6 4;stroke-width:1.3}.cross{stroke:#000;stroke-width:.7}
#peak text{font-weight:600}label{margin-right:14px;white-space:nowrap;font-size:13.5px}
i{display:inline-block;width:11px;height:11px;margin:0 5px;border-radius:2px}
table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto}
td,th{padding:3px 12px 3px 0;border-bottom:1px solid #e5e5e5;text-align:right;white-space:nowrap}
td:first-child,th:first-child{text-align:left}
#toggles input{display:none}.js #toggles input{display:inline}
#tip{position:fixed;pointer-events:none;background:#fffffff2;border:1px solid #999;border-radius:4px;padding:6px 10px;
font-size:12.5px;white-space:pre;font-family:ui-monospace,monospace;z-index:2}
"""

SCRIPT = """
"use strict";
document.body.classList.add("js");
const D = JSON.parse(document.getElementById("data").textContent), B = D.box, $ = id => document.getElementById(id);
const tip = $("tip"), t0 = D.seconds[0], span = Math.max(D.seconds[D.seconds.length - 1] - t0, 1e-9);
const inner = B.width - B.left - B.right;
const X = s => B.left + (s - t0) / span * inner;
const shown = D.terms.map(() => true);
function bytes(n) {
  for (const unit of ["B", "KiB", "MiB"]) {
    if (Math.abs(n) < 1024) return (unit === "B" || n >= 100 ? n.toFixed(0) : n.toFixed(1)) + " " + unit;
    n /= 1024;
  }
  return n.toFixed(2) + " GiB";
}
function draw() {
  const total = D.live.map(row => row.reduce((a, v, k) => a + (shown[k] ? v : 0), 0));
  const all = shown.every(Boolean), high = Math.max(...total, all ? D.rest : 0, 1) * 1.12;
  const Y = v => B.height - v / high * (B.height - B.top);
  const line = vs => { const p = []; vs.forEach((v, i) => { const x = X(D.seconds[i]).toFixed(1);
    if (i) p.push(x + "," + Y(vs[i - 1]).toFixed(1)); p.push(x + "," + Y(v).toFixed(1)); }); return p; };
  let base = D.live.map(() => 0);
  D.terms.forEach((_, k) => {
    const top = base.map((b, i) => b + (shown[k] ? D.live[i][k] : 0));
    document.querySelector("#figure polygon[data-term='" + k + "']")
      .setAttribute("points", line(top).concat(line(base).reverse()).join(" "));
    base = top;
  });
  let step = 1024; while (high / step > 6) step *= 2;
  let axis = "";
  for (let v = 0; v <= high; v += step) axis +=
    `<line x1="${B.left}" x2="${B.width - B.right}" y1="${Y(v)}" y2="${Y(v)}" class="grid"/>
    <text x="${B.left - 8}" y="${Y(v) + 4}" text-anchor="end">${bytes(v)}</text>`;
  $("axis").innerHTML = axis;
  $("peak").style.display = $("rest").style.display = all ? "" : "none";
  if (all) { $("rest").setAttribute("y1", Y(D.rest)); $("rest").setAttribute("y2", Y(D.rest)); }
}
document.querySelectorAll("#toggles input").forEach(box => box.addEventListener("change", () => {
  shown[+box.dataset.term] = box.checked; draw();
}));
function at(event, svg) {
  const point = svg.createSVGPoint(); point.x = event.clientX; point.y = event.clientY;
  const here = point.matrixTransform(svg.getScreenCTM().inverse());
  const s = t0 + (here.x - B.left) / inner * span;
  let low = 0, high = D.seconds.length - 1;
  while (low < high) { const mid = (low + high + 1) >> 1; if (D.seconds[mid] <= s) low = mid; else high = mid - 1; }
  return [low, here.y];
}
function show(event, text, i) {
  for (const id of ["cross", "cross2"]) {
    const line = $(id); line.setAttribute("x1", X(D.seconds[i])); line.setAttribute("x2", X(D.seconds[i]));
    line.setAttribute("visibility", "visible");
  }
  tip.textContent = text; tip.hidden = false;
  const left = event.clientX + 16 + tip.offsetWidth > innerWidth ? event.clientX - tip.offsetWidth - 16 : event.clientX + 16;
  tip.style.left = left + "px"; tip.style.top = Math.min(event.clientY + 12, innerHeight - tip.offsetHeight - 8) + "px";
}
function hide() { tip.hidden = true; for (const id of ["cross", "cross2"]) $(id).setAttribute("visibility", "hidden"); }
const head = i => (D.seconds[i] - t0).toFixed(4) + " s  " + D.labels[i] + "\\n";
$("figure").addEventListener("mousemove", event => {
  const [i] = at(event, $("figure"));
  let text = head(i), sum = 0;
  D.terms.map((name, k) => [name, D.live[i][k]]).reverse().forEach(([name, v]) => {
    sum += v; if (v) text += name.padEnd(24) + bytes(v).padStart(12) + "\\n"; });
  text += "sum".padEnd(24) + bytes(sum).padStart(12);
  if (D.resident[i] !== null) text += "\\n" + "process, resident".padEnd(24) + bytes(D.resident[i]).padStart(12);
  if (D.allocated[i] !== null) text += "\\n" + "device, allocated".padEnd(24) + bytes(D.allocated[i]).padStart(12);
  show(event, text, i);
});
$("rows").addEventListener("mousemove", event => {
  const [i, y] = at(event, $("rows"));
  const k = Math.min(Math.max(Math.floor((y - 2) / B.row), 0), D.buckets.length - 1);
  show(event, head(i) + D.buckets[k] + "  " + bytes(D.held[i][k]), i);
});
for (const id of ["figure", "rows"]) $(id).addEventListener("mouseleave", hide);
"""
