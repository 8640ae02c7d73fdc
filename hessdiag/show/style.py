"""The look of the page: one column, system fonts, light and dark, on a desk and on a phone."""

PHONE = 560
"""Pixels; a page this narrow shows pictures drawn for it."""

CSS = """
:root{color-scheme:light dark;--ink:#1c2430;--dim:#5b6472;--line:#dfe3e9;--ground:#fff;--tile:#f5f7fa;
--good:#15803d;--mind:#b45309}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ee;--dim:#9aa3b2;--line:#333a45;--ground:#14181f;--tile:#1d232c;
--good:#4ade80;--mind:#fbbf24}img{background:#fff;border-radius:6px}}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:920px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:22px;margin:0 0 18px;overflow-wrap:anywhere}h2{font-size:16px;margin:34px 0 8px}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(200px,1fr));gap:10px}
.tiles div{background:var(--tile);border-radius:8px;padding:10px 14px;display:flex;flex-direction:column}
.tiles small,.tiles i,.tiles span{color:var(--dim);font-size:12.5px;font-style:normal}.tiles b{font-size:22px}
.status{color:var(--dim)}.badge{border:1px solid;border-radius:10px;padding:1px 10px;margin-right:4px}
.good{color:var(--good)}.mind{color:var(--mind)}figure{margin:0}figcaption{color:var(--dim);font-size:13px}
img{width:100%;height:auto;display:block}.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13px;width:100%}
th{text-align:left;font-weight:500}td,thead th{text-align:right;white-space:nowrap}thead th:first-child{text-align:left}
td,th{padding:3px 8px;border-bottom:1px solid var(--line)}thead th{color:var(--dim)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 18px;font-size:14px}
dt{color:var(--dim)}dd{margin:0;overflow-wrap:anywhere}li{overflow-wrap:anywhere}
tbody th,thead th:first-child{position:sticky;left:0;background:var(--ground)}
@media(max-width:PHONEpx){main{padding:16px 12px 40px}.tiles{grid-template-columns:1fr 1fr}.tiles b{font-size:19px}
.tiles div{padding:8px 10px}dl{grid-template-columns:1fr}dd{margin-bottom:6px}
tbody th{min-width:40vw;overflow-wrap:anywhere}}
footer{margin-top:40px;color:var(--dim);font-size:12px}
""".strip().replace("PHONE", str(PHONE))
