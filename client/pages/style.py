"""The style sheet of the report: for light and dark screens, and for A4 paper."""

STYLE = """
:root{color-scheme:light dark;--ink:#1c2326;--soft:#566166;--paper:#fff;--tint:#f2f5f4;--line:#cfd8d6;
--main:#0b6e4f;--other:#9a4a16;--warn:#8a1c1c}
@media (prefers-color-scheme:dark){:root{--ink:#e6ecea;--soft:#a9b5b2;--paper:#14191a;--tint:#1e2627;--line:#3b4747;
--main:#4cc79c;--other:#e39a63;--warn:#ff9a94}}
*{box-sizing:border-box}
body{margin:0 auto;padding:2rem 1.25rem 4rem;max-width:54rem;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .25rem}h2{font-size:1.25rem;margin:2.25rem 0 .5rem;
border-bottom:2px solid var(--main);padding-bottom:.2rem}h3{font-size:1.05rem;margin:1.4rem 0 .3rem}
p,ul{margin:.5rem 0;max-width:46rem;overflow-wrap:break-word}ul{padding-left:1.2rem}li{margin:.2rem 0}
.lead{color:var(--soft);margin-top:0}
.conclusion{font-size:1.15rem;font-weight:600;margin:.5rem 0 .75rem}
.note{color:var(--soft);font-size:.9rem}.bad{color:var(--warn);font-weight:600}
.good{color:var(--main);font-weight:600}
code{background:var(--tint);border-radius:3px;padding:0 .25rem;font-size:.92em;overflow-wrap:anywhere}
.warning{border:3px solid var(--warn);border-radius:6px;padding:.25rem 1rem;margin:0 0 1.25rem;
color:var(--warn);font-weight:600}
.warning h2{margin-top:.5rem;border:0}.warning ul{list-style:none;padding:0}
.tiles{display:flex;flex-wrap:wrap;gap:.75rem;margin:1.25rem 0}
.tile{flex:1 1 9.5rem;background:var(--tint);border:1px solid var(--line);border-radius:6px;padding:.6rem .8rem}
.tile b{display:block;font-size:1.4rem;line-height:1.25}.tile span{color:var(--soft);font-size:.85rem}
.explained{margin-bottom:.75rem}.explained p{font-size:.9rem;margin:.35rem 0 0;max-width:none}
.wide{overflow-x:auto;margin:.75rem 0}
table{border-collapse:collapse;width:100%;font-size:.92rem}caption{text-align:left;color:var(--soft);padding:.25rem 0;
font-size:.88rem}th,td{padding:.35rem .6rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
thead th{border-bottom:2px solid var(--line);font-size:.85rem;vertical-align:bottom}
tbody th{font-weight:500;min-width:8rem}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
dl{margin:.75rem 0}dl div{display:flex;gap:1rem;padding:.25rem 0;border-bottom:1px solid var(--line)}
dt{flex:0 0 11rem;color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
figure{margin:1rem 0}svg{width:100%;height:auto;max-width:36rem;display:block}
figcaption{color:var(--soft);font-size:.88rem}
svg text{fill:var(--ink);font:13px system-ui,"DejaVu Sans",sans-serif}.grid{stroke:var(--line);stroke-width:1}
.curve{fill:none;stroke:var(--main);stroke-width:2.5}.dot{fill:var(--main)}.bar{fill:var(--main)}
.span{stroke:var(--main);stroke-width:2}.other{fill:var(--other)}.span-other{stroke:var(--other);stroke-width:2}
.level{stroke:var(--other);stroke-width:1.5;stroke-dasharray:6 4}
.level-other{stroke:var(--soft);stroke-width:2;stroke-dasharray:2 4}
@media (max-width:34rem){body{padding:1.25rem .9rem 3rem}dl div{display:block}dt{font-size:.88rem}
th,td{padding:.35rem .3rem}table{font-size:.84rem}tbody th{min-width:5.5rem;overflow-wrap:anywhere}
.number{white-space:normal}
.many thead{display:none}.many table,.many caption,.many tbody,.many tr,.many th,.many td{display:block}
.many tr{border-bottom:1px solid var(--line);padding:.3rem 0}.many th,.many td{border:0;padding:.1rem 0;text-align:left}
.many td::before{content:attr(data-name) ": ";color:var(--soft)}}
.run+.run{margin-top:4rem;border-top:6px solid var(--line);padding-top:1.5rem}
@page{size:A4;margin:16mm}
@media print{:root{color-scheme:light;--ink:#000;--soft:#444;--paper:#fff;--tint:#f4f4f4;--line:#bbb;--main:#0b6e4f;
--other:#9a4a16;--warn:#8a1c1c}body{padding:0;max-width:none;font-size:10pt}h2,h3{break-after:avoid}
figure,tr,.tile{break-inside:avoid}.wide{overflow:visible}.number{white-space:normal}svg{max-width:30rem}thead{display:table-header-group;break-after:avoid}caption{break-after:avoid}.run+.run{break-before:page;border:0;margin:0}
.tile,.bar{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
