"""The style sheet of a page: light and dark mode, wide and narrow screens, and print."""

LIGHT = """--ink:#1a1d21;--soft:#565d66;--paper:#ffffff;--card:#f4f5f7;--line:#d5d9de;
--blue:#0072b2;--vermillion:#d55e00;--green:#008060;--purple:#b0588a;--grey:#767676"""
DARK = """--ink:#e6e8eb;--soft:#a3abb5;--paper:#15181c;--card:#1f242a;--line:#3a414a;
--blue:#56b4e9;--vermillion:#f0803c;--green:#2fc29a;--purple:#e39cc4;--grey:#9a9a9a"""
STYLE = (
    f"""
:root{{color-scheme:light dark;{LIGHT}}}
@media (prefers-color-scheme:dark){{:root{{{DARK}}}}}
"""
    + """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:1rem/1.45 system-ui,-apple-system,"Segoe UI",sans-serif}
main,header,footer,nav{max-width:75rem;margin:0 auto;padding:0 1rem}
h1{font-size:1.5rem;line-height:1.25;margin:1rem 0 .15rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;line-height:1.3;margin:0;display:inline}
h3{font-size:1rem;margin:.9rem 0 .3rem}
p,li{max-width:75ch;overflow-wrap:anywhere}
p{margin:.4rem 0}
ul{margin:.3rem 0;padding-left:1.2rem}
a{color:var(--blue)}
.soft,figcaption,caption,footer{color:var(--soft);font-size:.9rem}
.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
.columns{display:grid;gap:1rem 2rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,28rem),1fr));margin:.75rem 0}
.columns>*{min-width:0}
.card{background:var(--card);border-left:.3rem solid var(--blue);border-radius:.3rem;padding:.6rem 1rem;margin:.75rem 0}
.card li{font-size:.92rem}
.answer{font-size:1.15rem;line-height:1.35;font-weight:600;margin:0 0 .3rem}
.contents{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;margin:.5rem 0 1rem;padding:0;list-style:none}
section>details{border-top:1px solid var(--line)}
section>details>summary{padding:.6rem 0}
.gist{color:var(--soft);margin-left:.6rem}
.inside{padding-bottom:1rem;scroll-margin-top:3.5rem}
.figures{display:grid;gap:1.25rem 2rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr))}
.figures{margin:.5rem 0}
figure{margin:0;min-width:0;max-width:37rem}
figure svg{display:block;width:100%;height:auto}
svg text{font-family:system-ui,-apple-system,"Segoe UI",sans-serif!important}
.wide{overflow-x:auto;max-width:100%;margin:.75rem 0}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:.25rem 0}
th,td{padding:.2rem .75rem .2rem 0;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}
thead th{white-space:normal;vertical-align:bottom;max-width:12rem}
tbody th{white-space:normal;min-width:6rem;font-weight:400}
th.words{text-align:left}
td.words{text-align:left;white-space:normal;min-width:11rem;max-width:60ch;overflow-wrap:anywhere}
.bars{width:100%}
.bars th,.bars td{border:0;padding-bottom:.1rem}
.bars td:last-child{width:45%;padding-right:0}
.bars i{display:block;height:.8rem;border-radius:.15rem;background:var(--grey)}
.bars tr:first-child th,.bars tr:first-child td{font-weight:600}
.bars tr:first-child i{background:var(--blue)}
summary{cursor:pointer;padding:.3rem 0}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.85rem;line-height:1.35;margin:.4rem 0;max-height:9.5rem}
pre{overflow-y:auto;border-left:.15rem solid var(--line);padding-left:.7rem}
pre b{font-weight:400;color:var(--soft)}
main>.card .answer{max-width:none}
.card li{break-inside:avoid}
@media (min-width:60rem){main>.card ul{columns:2;column-gap:2.5rem}}
"""
    + f"""
@media print{{:root{{color-scheme:light;{LIGHT}}}
@page{{margin:1.5cm}}
body{{font-size:10pt}}
nav,details.table:not([open]){{display:none}}
section>details::details-content{{content-visibility:visible;height:auto}}
section>details>summary{{list-style:none;break-after:avoid}}
figure,.card,tr{{break-inside:avoid}}
pre{{max-height:none}}
.wide{{overflow:visible}}
.figures{{grid-template-columns:1fr 1fr}}
}}
"""
)
