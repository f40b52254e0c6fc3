"""The style sheet of `report.html`: light and dark by the reader's setting, printable, no outside font."""

from __future__ import annotations

STYLE = """
:root{--bg:#f7f8fa;--card:#fff;--ink:#1c2430;--soft:#667085;--rule:#e4e7ec;--accent:#1f7a8c;
--c0:#1f7a8c;--c1:#e4572e;--c2:#7b5ea7;--c3:#2e9e5b;--c4:#d9a404;--c5:#c2407a;--c6:#4b6bd6;--c7:#8c5a2b;--c8:#4f9d9d;--c9:#777}
@media (prefers-color-scheme:dark){:root{--bg:#10141a;--card:#171c24;--ink:#e6eaf0;--soft:#98a2b3;--rule:#2a323d;--accent:#4ecdc4;
--c0:#4ecdc4;--c1:#ff6b6b;--c2:#9b8cff;--c3:#6bcb77;--c4:#ffd166;--c5:#f78fb3;--c6:#5aa9e6;--c7:#ff9f68;--c8:#c8e06a;--c9:#aaa}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:30px;margin:0;letter-spacing:-.02em}h2{font-size:20px;margin:0 0 12px}
h3{font-size:15px;margin:18px 0 6px;color:var(--soft)}
.lead{color:var(--soft);margin:4px 0 20px}
section{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:20px 22px;margin-top:20px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:12px}
.card{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:14px 16px;display:flex;flex-direction:column}
.card b{font-size:24px;font-weight:650;font-variant-numeric:tabular-nums}.card span{color:var(--soft)}
.card i{color:var(--soft);font-size:12.5px;font-style:normal;min-height:1.5em}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th{color:var(--soft);font-weight:500;font-size:12.5px;text-align:right;padding:4px 10px;border-bottom:1px solid var(--rule)}
td{text-align:right;padding:5px 10px;border-bottom:1px solid var(--rule);white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}td:first-child{white-space:normal}
tr:not(.dataset) td:first-child{padding-left:16px}tr.dataset td{background:color-mix(in srgb,var(--accent) 7%,transparent)}
.bar{display:block;width:120px;height:8px;border-radius:4px;background:var(--rule)}
.bar i{display:block;height:8px;border-radius:4px;background:var(--accent)}
.note{color:var(--soft);font-size:13px;margin:10px 0 0}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(420px,1fr));gap:18px 24px}
figure{margin:0}.chart figcaption{font-weight:600}.chart small{color:var(--soft);font-weight:400}
svg{width:100%;height:auto;display:block}svg text{font:11px system-ui,sans-serif;fill:var(--soft)}
.grid{stroke:var(--rule);stroke-width:1}.line{fill:none;stroke-width:1.8;stroke-linejoin:round}
.line.c0{stroke:var(--c0)}.line.c1{stroke:var(--c1)}.line.c2{stroke:var(--c2)}.line.c3{stroke:var(--c3)}.line.c4{stroke:var(--c4)}
.line.c5{stroke:var(--c5)}.line.c6{stroke:var(--c6)}.line.c7{stroke:var(--c7)}.line.c8{stroke:var(--c8)}.line.c9{stroke:var(--c9)}
.c0{--k:var(--c0)}.c1{--k:var(--c1)}.c2{--k:var(--c2)}.c3{--k:var(--c3)}.c4{--k:var(--c4)}
.c5{--k:var(--c5)}.c6{--k:var(--c6)}.c7{--k:var(--c7)}.c8{--k:var(--c8)}.c9{--k:var(--c9)}
.key{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:5px;background:var(--k)}.dot{fill:var(--k)}
.legend{display:flex;flex-wrap:wrap;gap:4px 14px;font-size:12.5px;color:var(--soft);margin-top:4px}
.pair{display:grid;grid-template-columns:repeat(auto-fill,minmax(420px,1fr));gap:12px}
.pair img{width:100%;border-radius:8px;display:block}.pair figcaption{color:var(--soft);font-size:12.5px;padding:4px 2px}
pre{background:var(--bg);border:1px solid var(--rule);border-radius:8px;padding:12px 14px;
overflow:auto;font-size:12.5px;max-height:420px}
details{margin-top:10px}summary{cursor:pointer;color:var(--accent)}code{font-size:13px}
@media print{section{break-inside:avoid}}
@media (max-width:520px){.charts,.pair{grid-template-columns:1fr}}
""".strip()
