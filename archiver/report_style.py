"""The look of a report, light and dark, and the script that searches and sorts its table."""

STYLE = """
:root{--font:system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",Arial,sans-serif;color-scheme:light dark;
--page:#f6f5f1;--card:#fff;--ink:#1b2424;--soft:#566463;--line:#dcdcd4;--link:#0f6460;--paper:#fff;--kept:#177469;--saved:#cbe2da;
--p0:#b5501b;--p1:#2f5f9e;--p2:#5d6f8c;--p3:#7a4f9c;--p4:#177469;--p5:#6b6b63;--p6:#8a4a5a;
--s0:#e5e4de;--s1:#d2e6df;--s2:#abd5c9;--s3:#7cc1b2;--s4:#4aa797;--s5:#1b7a70;--s6:#0f5f5b;--s7:#083f43;
--i0:#333b3a;--i1:#12302c;--i2:#0d2b27;--i3:#08231f;--i4:#03181a;--i5:#fff;--i6:#fff;--i7:#fff}
@media(prefers-color-scheme:dark){:root{
--page:#0f1416;--card:#171e20;--ink:#e8eeec;--soft:#a3b1ae;--line:#2c3638;--link:#7fd1c2;--paper:#0b1112;--kept:#3fa391;--saved:#24423f;
--p0:#ec9a5f;--p1:#7fb0ee;--p2:#a3b4d0;--p3:#c39ae4;--p4:#5ec3b1;--p5:#b3b3a8;--p6:#dc9aa9;
--s0:#2b3335;--s1:#23413e;--s2:#1f5852;--s3:#1f6f66;--s4:#349484;--s5:#5bb3a3;--s6:#8fd0c1;--s7:#c8ece2;
--i0:#d9e0de;--i1:#e3efeb;--i2:#eaf6f2;--i3:#f1fbf8;--i4:#04110f;--i5:#04110f;--i6:#04110f;--i7:#04110f}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 var(--font);-webkit-text-size-adjust:100%}
main{max-width:1120px;margin:0 auto;padding:28px 40px 48px}
header{margin:0 0 18px}
h1{font-size:30px;line-height:1.2;margin:0;overflow-wrap:anywhere;letter-spacing:-.01em}
h2{font-size:20px;margin:0 0 14px;letter-spacing:-.005em}
.kind{margin:0 0 2px;color:var(--soft)}
small{display:block;color:var(--soft);font-size:13px;font-weight:400;line-height:1.35}
section{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:24px 28px;margin:0 0 18px}
.hero .big{font-size:27px;line-height:1.3;margin:0 0 18px;letter-spacing:-.01em;text-wrap:balance}
.big b{color:var(--link)}
.row{display:grid;grid-template-columns:150px 1fr 190px;gap:16px;
align-items:center;margin:8px 0;font-variant-numeric:tabular-nums}
.row span:first-child{color:var(--soft)}
.track{display:block}
.track i{display:block;height:24px;border-radius:5px;min-width:2px}
i.kept{background:var(--kept)}i.saved{background:var(--saved)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(145px,1fr));gap:12px;margin:0 0 18px}
.cards div{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:14px 15px}
dt{color:var(--soft);font-size:14px}
.cards dd{margin:2px 0 0;font-size:18px;font-weight:600;line-height:1.3;overflow-wrap:anywhere}
.cards dd small{margin-top:2px}
figure{margin:0}
figcaption{color:var(--soft);font-size:14px;margin-top:12px;max-width:80ch}
.chart{display:block;width:100%;height:auto;overflow:visible}
.chart text{font-family:var(--font);font-variant-numeric:tabular-nums;pointer-events:none}
.narrow{display:none}
#map .cell{cursor:pointer}
.cell:hover path{stroke:var(--ink);stroke-width:2px}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:6px 20px;padding:0;margin:14px 0 0;font-size:14px;color:var(--soft)}
.legend li{display:flex;align-items:center;gap:7px}
.only{display:none}
.chip{width:14px;height:14px;border-radius:3px;flex:none}
.s0{background:var(--s0)}.s1{background:var(--s1)}.s2{background:var(--s2)}.s3{background:var(--s3)}
.s4{background:var(--s4)}.s5{background:var(--s5)}.s6{background:var(--s6)}.s7{background:var(--s7)}
.p0{background:var(--p0)}.p1{background:var(--p1)}.p2{background:var(--p2)}.p3{background:var(--p3)}
.p4{background:var(--p4)}.p5{background:var(--p5)}.p6{background:var(--p6)}
.notes{margin:0 0 16px;padding:12px 16px 12px 34px;border-radius:10px;background:var(--page);overflow-wrap:anywhere}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--soft);font-size:14px;padding:0 0 8px}
th,td{padding:8px 0 8px 20px;text-align:right;vertical-align:top;border-top:1px solid var(--line);white-space:nowrap}
th:first-child{text-align:left;padding-left:0;white-space:normal;overflow-wrap:anywhere;font-weight:500}
thead th{border-top:0;font-size:14px;color:var(--soft);font-weight:500;vertical-align:bottom;white-space:normal}
thead button{font:inherit;color:inherit;background:none;border:0;padding:4px 0;cursor:pointer;text-align:inherit}
thead button:hover{color:var(--ink)}
[aria-sort=ascending] button::after{content:" ↑"}[aria-sort=descending] button::after{content:" ↓"}
[aria-sort=ascending],[aria-sort=descending]{color:var(--ink)}
.meter{display:block;width:72px;height:5px;border-radius:3px;background:var(--saved);margin:4px 0 0 auto;overflow:hidden}
.meter i{display:block;height:100%;background:var(--kept)}
.spark{width:132px;height:22px;fill:var(--p0);display:block;margin-left:auto;border-bottom:1px solid var(--line)}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(260px,1fr));gap:10px 28px;margin:20px 0 0}
.facts dd{margin:0;overflow-wrap:anywhere}
.tools{display:flex;gap:12px;align-items:center;margin:0 0 14px;color:var(--soft)}
.tools[hidden]{display:none}
input,#all{font:inherit;color:var(--ink);background:var(--page);border:1px solid var(--soft);border-radius:9px;padding:8px 12px}
input{flex:1;min-width:0;max-width:420px}
#all{cursor:pointer;margin-top:14px}
output{font-size:14px}
:focus-visible{outline:3px solid var(--link);outline-offset:2px;border-radius:3px}
footer{color:var(--soft);font-size:14px;padding:6px 4px;max-width:80ch}
footer h2{font-size:15px;margin:0 0 4px;color:var(--ink)}footer p{margin:0 0 8px}
code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.95em}
.skip{position:absolute;left:-999px}.skip:focus{left:12px;top:8px;background:var(--card);padding:8px 12px;color:var(--link)}
@media(max-width:840px){
main{padding:18px 14px 32px}h1{font-size:24px}section{padding:18px 16px;border-radius:12px}
.wide{display:none}.narrow{display:block;max-width:560px;margin:0 auto}
.hero .big{font-size:22px}
.row{grid-template-columns:1fr auto;gap:2px 12px}.row .track{grid-column:1/-1;grid-row:2}
.cards{grid-template-columns:repeat(auto-fit,minmax(155px,1fr));gap:8px}.cards div{padding:11px 13px}
.x,.z{display:none}.only{display:block}
th,td{padding-left:10px;font-size:14px}.facts{grid-template-columns:1fr}
small{font-size:12px}
.meter{width:48px}
}
@media print{body{background:none}section{break-inside:avoid}.tools{display:none}}
"""

# A table of some hundred rows shows its first ones until it is asked for all; without a script all of them are there.
SCRIPT = """
(() => {
const table = document.getElementById("t"); if (!table) return;
const body = table.tBodies[0], rows = [...body.rows], first = 40;
const text = rows.map(r => r.cells[0].textContent.toLowerCase());
const q = document.getElementById("q"), n = document.getElementById("n"), all = document.getElementById("all");
let every = rows.length <= first;
document.querySelectorAll(".tools").forEach(e => e.hidden = false);
rows.forEach((r, i) => r.at = i);
function show() {
  const words = q.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let found = 0;
  for (const r of body.rows) {
    const fits = words.every(w => text[r.at].includes(w));
    r.hidden = !fits || (!every && found >= first);
    found += fits;
  }
  n.textContent = words.length ? found + " of " + rows.length : "";
  all.parentNode.hidden = every || found <= first;
}
q.addEventListener("input", show);
all.addEventListener("click", () => { every = true; show(); });
[...table.tHead.rows[0].cells].forEach((head, k) => head.addEventListener("click", () => {
  const up = head.getAttribute("aria-sort") === (k ? "descending" : "ascending") ? !!k : !k;
  for (const h of table.tHead.rows[0].cells) h.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = r => k ? +r.cells[k].dataset.v : r.cells[0].textContent;
  rows.sort((a, b) => {
    const x = key(a), y = key(b);
    const c = k ? x - y : x.localeCompare(y, "en", {numeric: true});
    return (up ? c : -c) || a.at - b.at;
  });
  body.append(...rows); show();
}));
document.querySelectorAll("#map .cell").forEach(cell => cell.addEventListener("click", () => {
  q.value = cell.querySelector("title").textContent.split("\\n")[0]; show();
  q.scrollIntoView({block: "start"}); q.focus({preventScroll: true});
}));
show();
})();
"""
