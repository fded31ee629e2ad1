"""The page's look."""

CSS = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c2430; --dim: #5b6675;
  --line: #dfe4ea; --card: #f6f8fa; --heat: 20 74 168; --deep-ink: #ffffff;
  --c0: #2563c4; --c1: #d9541e; --c2: #15803d; }
@media (prefers-color-scheme: dark) { :root { --paper: #12161d; --ink: #e4e8ee; --dim: #97a3b3;
  --line: #2b333f; --card: #1a2029; --heat: 125 177 255; --deep-ink: #0c1118;
  --c0: #7db1ff; --c1: #ff9a62; --c2: #5bd08a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 28px 22px 60px; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 25px; margin: 0 0 2px; } h2 { font-size: 18px; margin: 38px 0 10px;
  border-bottom: 1px solid var(--line); padding-bottom: 5px; }
p { margin: 6px 0 10px; } .dim, figcaption, caption { color: var(--dim); }
code, pre { font: 13px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; margin: 6px 0;
  padding: 9px 11px; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(168px, 1fr)); gap: 10px;
  margin: 18px 0 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 10px 13px; }
.card b { display: block; font-size: 19px; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.card span { color: var(--dim); font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(400px, 1fr));
  gap: 18px 30px; }
@media (max-width: 460px) { .charts { grid-template-columns: 1fr; } }
.wide { overflow-x: auto; }
.row { display: flex; flex-wrap: wrap; gap: 22px 34px; align-items: flex-start; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
caption { text-align: left; padding-bottom: 5px; }
th { font-weight: 500; color: var(--dim); text-align: left; padding: 2px 9px 2px 0; }
td { padding: 2px 12px 2px 0; vertical-align: top; }
table.heat th { text-align: right; padding: 1px 6px; font-size: 12px; }
table.heat td { text-align: center; white-space: nowrap; min-width: 58px;
  padding: 2px 5px; font-size: 12px; border: 1px solid var(--paper);
  background: rgb(var(--heat) / var(--depth)); }
table.heat td.deep { color: var(--deep-ink); }
figure { margin: 0; min-width: 0; }
figcaption { font-size: 13px; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--dim); font-size: 11px; font-family: inherit; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.c0 { --color: var(--c0); } .c1 { --color: var(--c1); } .c2 { --color: var(--c2); }
svg .line { stroke: var(--color); } svg .dot { fill: var(--color); }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px; border-radius: 2px;
  background: var(--color); margin: 0 5px 3px 10px; }
h3 { font-size: 14px; font-weight: 600; margin: 20px 0 4px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 10px; }
.pair div > b, .ask > b { font-weight: 500; color: var(--dim); font-size: 13px; }
details { margin: 12px 0; } summary { cursor: pointer; color: var(--dim); }
"""
