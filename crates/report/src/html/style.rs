//! The look of the page: two palettes, and paper.

/// The style sheet. Colours are variables, so that the charts follow the palette.
pub(super) const STYLE: &str = r#"
:root{color-scheme:light dark;--page:#f6f5f1;--card:#fff;--ink:#1d1c1a;--muted:#65635c;--line:#e3e1da;--grid:#ecebe5;
--bar:#2f74c9;--mark:#c4501b;--rest:#b9b6ab;--good:#1a7f37;--bad:#b3261e;--well:#f3f2ed}
@media (prefers-color-scheme:dark){:root{--page:#151514;--card:#1e1e1c;--ink:#efeee8;--muted:#a5a39a;--line:#383732;
--grid:#2c2b28;--bar:#5e9eea;--mark:#f08f5b;--rest:#5d5b54;--good:#58c377;--bad:#f28b82;--well:#272623}}
@media print{:root{color-scheme:light;--page:#fff;--card:#fff;--ink:#000;--muted:#444;--line:#bbb;--grid:#ddd;--bar:#2f74c9;
--mark:#c4501b;--rest:#b9b6ab;--good:#1a7f37;--bad:#b3261e;--well:#f4f4f4}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}section,.tile,tr,svg{break-inside:avoid}main{padding:0!important}
details>*{display:block!important}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
main{max-width:1040px;margin:0 auto;padding:32px 20px 48px}
h1{font-size:26px;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere;text-wrap:balance}
h2{font-size:17px;margin:0 0 2px}
*+h2{margin-top:20px}
p{margin:0 0 12px}
.sub,.note{color:var(--muted)}
.note{font-size:13.5px;max-width:76ch}
a{color:var(--bar)}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:20px 22px;margin-top:16px;min-width:0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(148px,1fr));gap:12px;margin-top:20px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:13px 14px}
.tile b{display:block;font-size:20px;font-weight:600;line-height:1.3;font-variant-numeric:tabular-nums}
.tile span{color:var(--muted);font-size:13px;display:block}
.two{display:grid;grid-template-columns:minmax(0,1.7fr) minmax(240px,1fr);gap:28px;align-items:start}
@media (max-width:760px){.two{grid-template-columns:minmax(0,1fr)}}
.scroll{overflow-x:auto}
svg{display:block;width:100%;height:auto;margin-top:6px}
svg text{fill:var(--muted);font-size:12px;font-family:inherit;font-variant-numeric:tabular-nums}
.wide svg{min-width:560px}
svg text.ink{fill:var(--ink)}
.grid{stroke:var(--grid)}.axis{stroke:var(--rest)}
.b{fill:var(--bar)}.r{fill:var(--rest)}.m{fill:var(--mark)}
.l{stroke:var(--mark);fill:none;stroke-width:2;stroke-linejoin:round}
.d{stroke:var(--mark);stroke-dasharray:4 3}
svg text.mt{fill:var(--mark)}
.key{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13px;color:var(--muted);margin-top:8px}
.key i{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:6px;vertical-align:-1px}
.key i.line{height:3px;width:16px;vertical-align:3px}
table{border-collapse:collapse;width:100%;font-size:14px;margin-top:8px}
th,td{text-align:left;padding:6px 14px 6px 0;border-top:1px solid var(--line);vertical-align:top;overflow-wrap:anywhere}
tr:first-child>*{border-top:0}
th{font-weight:500;color:var(--muted)}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap;padding-right:0;padding-left:14px}
table.settings th{width:30%}
code,pre{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.875em}
code{overflow-wrap:anywhere}
pre{font-size:13px;background:var(--well);border-radius:6px;padding:10px 12px;margin:6px 0 0;white-space:pre-wrap;overflow-wrap:anywhere}
.engine{display:grid;grid-template-columns:210px minmax(0,1fr);gap:4px 18px;padding:12px 0;border-top:1px solid var(--line)}
.engine:first-of-type{border-top:0}
@media (max-width:640px){.engine{grid-template-columns:minmax(0,1fr)}}
.yes,.no{font-weight:600}.yes{color:var(--good)}.no{color:var(--bad)}
.engine ul{margin:4px 0 0;padding-left:18px;font-size:13.5px;color:var(--muted)}
ul.notes{margin:8px 0 0;padding-left:20px}
footer{color:var(--muted);font-size:13px;margin-top:20px}
"#;
