"""Style and script of the page. The script only adds to what is drawn already: values under the pointer, and toggles."""

STYLE = """
:root{color-scheme:light dark;--text:#222;--dim:#555;--back:#fff;--line:#ddd;--card:#f6f2e9}
@media(prefers-color-scheme:dark){:root{--text:#ddd;--dim:#aaa;--back:#181818;--line:#404040;--card:#2b2721}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--text);background:var(--back);
max-width:1120px;margin:24px auto;padding:0 16px}
h1{font-size:22px}h2{font-size:17px;margin:26px 0 6px}
.peak{background:var(--card);border-left:4px solid #c44e52;padding:10px 14px;overflow-wrap:anywhere}
li{overflow-wrap:anywhere}.peak p{margin:0 0 4px}.peak p:first-child{font-weight:600}
.note{color:var(--dim);font-size:13px}.note span{white-space:nowrap}
.note .hint{display:none}.js .note .hint{display:inline;white-space:normal}
.wide{overflow-x:auto}svg{width:100%;min-width:880px;height:auto;display:block}
svg text{font:12px system-ui,sans-serif;fill:currentColor}svg text.small{font-size:11px}
.grid{stroke:var(--line)}.rest{stroke:currentColor;stroke-dasharray:6 4;stroke-width:1.3}
.cross{stroke:currentColor;stroke-width:.7}
#peak text{font-weight:600}#peak circle{fill:currentColor}label{margin-right:14px;white-space:nowrap;font-size:13.5px}
i{display:inline-block;width:11px;height:11px;margin:0 5px;border-radius:2px}
table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto}
td,th{padding:3px 12px 3px 0;border-bottom:1px solid var(--line);text-align:left;overflow-wrap:anywhere}
.numbers td,.numbers th{text-align:right;white-space:nowrap}
.numbers td:first-child,.numbers th:first-child{text-align:left;white-space:normal;min-width:12em;max-width:24em;
position:sticky;left:0;background:var(--back)}.pairs td:first-child{min-width:9em}
#toggles input{display:none}.js #toggles input{display:inline}
#tip{position:fixed;pointer-events:none;background:var(--back);border:1px solid #999;border-radius:4px;padding:6px 10px;
font:12.5px/1.5 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere;max-width:calc(100vw - 40px);z-index:2}
"""

SCRIPT = """
"use strict";
document.body.classList.add("js");
const D = JSON.parse(document.getElementById("data").textContent), B = D.box, $ = id => document.getElementById(id);
const tip = $("tip"), t0 = D.seconds[0], last = D.seconds.length - 1, span = Math.max(D.seconds[last] - t0, 1e-9);
const inner = B.width - B.left - B.right;
const X = s => B.left + (s - t0) / span * inner;
const shown = D.terms.map(() => true);
let now = D.peak || 0;
function bytes(n) {
  for (const unit of ["B", "KiB", "MiB"]) {
    if (Math.abs(n) < 1024) return (unit === "B" || n >= 100 ? n.toFixed(0) : n.toFixed(1)) + " " + unit;
    n /= 1024;
  }
  return n.toFixed(2) + " GiB";
}
function draw() {
  const total = D.live.map(row => row.reduce((a, v, k) => a + (shown[k] ? v : 0), 0));
  const all = shown.every(Boolean), high = all ? D.high : Math.max(...total, 1) * 1.12;
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
    <text x="${B.left - 8}" y="${Y(v) + 4}" text-anchor="end">${bytes(v).replace(".00 ", " ").replace(".0 ", " ")}</text>`;
  $("axis").innerHTML = axis;
  $("peak").style.display = $("rest").style.display = all ? "" : "none";
}
document.querySelectorAll("#toggles input").forEach(box => {
  box.checked = true;  // a browser that reloads keeps what was left out
  box.addEventListener("change", () => { shown[+box.dataset.term] = box.checked; draw(); });
});
function at(event, svg) {
  const point = svg.createSVGPoint(); point.x = event.clientX; point.y = event.clientY;
  const here = point.matrixTransform(svg.getScreenCTM().inverse());
  if (D.peak !== null && Math.abs(X(D.seconds[D.peak]) - here.x) < 3) return [D.peak, here.y];  // often narrower than a pixel
  const s = t0 + (here.x - B.left) / inner * span;
  let low = 0, high = last;
  while (low < high) { const mid = (low + high + 1) >> 1; if (D.seconds[mid] <= s) low = mid; else high = mid - 1; }
  return [low, here.y];
}
function show(x, y, text, i) {
  now = i;
  document.querySelectorAll(".cross").forEach(line => {
    line.setAttribute("x1", X(D.seconds[i])); line.setAttribute("x2", X(D.seconds[i]));
    line.setAttribute("visibility", "visible");
  });
  tip.textContent = text; tip.hidden = false; tip.style.left = tip.style.top = 0;
  const left = x + 16 + tip.offsetWidth > innerWidth ? x - tip.offsetWidth - 16 : x + 16;
  tip.style.left = Math.max(Math.min(left, innerWidth - tip.offsetWidth - 8), 8) + "px";
  tip.style.top = Math.max(Math.min(y + 12, innerHeight - tip.offsetHeight - 8), 8) + "px";
}
function hide() {
  tip.hidden = true;
  document.querySelectorAll(".cross").forEach(line => line.setAttribute("visibility", "hidden"));
}
const head = i => (D.seconds[i] - t0).toFixed(4) + " s  " + D.labels[i] + "\\n";
const row = (name, v) => name.padEnd(22) + bytes(v).padStart(10);
function values(i) {
  const rows = [];
  D.terms.forEach((name, k) => { if (D.live[i][k]) rows.unshift(row(name, D.live[i][k])); });
  rows.push(row("sum", D.live[i].reduce((a, v) => a + v, 0)));
  if (D.resident[i] !== null) rows.push(row("process, resident", D.resident[i]));
  if (D.allocated[i] !== null) rows.push(row("device, allocated", D.allocated[i]));
  return head(i) + rows.join("\\n");
}
function held(k, i) {
  let value = 0;
  for (const [place, v] of D.held[k]) { if (place > i) break; value = v; }
  return value;
}
for (const svg of document.querySelectorAll("svg")) {
  svg.addEventListener("mousemove", event => {
    const [i, y] = at(event, svg);
    const k = Math.min(Math.max(Math.floor((y - 2) / B.row), 0), D.buckets.length - 1);
    show(event.clientX, event.clientY, svg.id === "rows" ? head(i) + D.buckets[k] + "  " + bytes(held(k, i)) : values(i), i);
  });
  svg.addEventListener("mouseleave", hide);
}
$("figure").addEventListener("keydown", event => {
  if (event.key === "Escape") hide();
  const to = {ArrowLeft: tip.hidden ? now : now - 1, ArrowRight: tip.hidden ? now : now + 1, Home: 0, End: last, p: D.peak,
    P: D.peak}[event.key];
  if (to === undefined || to === null) return;
  event.preventDefault();
  const i = Math.min(Math.max(to, 0), last), svg = $("figure");
  const x = () => svg.getScreenCTM().a * X(D.seconds[i]) + svg.getScreenCTM().e;
  if (x() < 0 || x() > innerWidth) wide[0].scrollLeft += x() - innerWidth / 2;
  show(x(), svg.getBoundingClientRect().top + B.top, values(i), i);
});
$("figure").addEventListener("blur", hide);
const wide = [...document.querySelectorAll(".wide")];  // on a narrow screen figures scroll sideways, all as one
wide.forEach(one => one.addEventListener("scroll", () => wide.forEach(each => { each.scrollLeft = one.scrollLeft; })));
"""
