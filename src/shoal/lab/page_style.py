"""The report page's style sheet: light and dark, print, no fonts or images from elsewhere."""

STYLE = """
:root { --ink:#24272c; --muted:#6c7078; --grid:#e3e5e8; --card:#ffffff; --back:#f5f6f8;
  --line:#dfe2e6; --accent:#0072b2; --good:#00704f; --good-back:#dff3ea; --bad:#a33a00;
  --bad-back:#fde6d8; --open:#7a5a00; --open-back:#fbf0cf; --quiet-back:#eceef1;
  --font:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
  --mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace; }
@media (prefers-color-scheme:dark) { :root { --ink:#e4e6ea; --muted:#9aa0a9; --grid:#2f343b;
  --card:#1c2026; --back:#14171b; --line:#30353d; --accent:#56b4e9; --good:#6fd3ac;
  --good-back:#173b2f; --bad:#ffab85; --bad-back:#48230f; --open:#f0cf74; --open-back:#40340f;
  --quiet-back:#2a2f36; } }
* { box-sizing:border-box; }
body { margin:0; background:var(--back); color:var(--ink); font:15px/1.5 var(--font);
  -webkit-font-smoothing:antialiased; }
main { max-width:1120px; margin:0 auto; padding:40px 24px 64px; }
header { margin-bottom:28px; }
.over { margin:0; color:var(--accent); font-weight:600; font-size:13px; letter-spacing:.02em; }
h1 { margin:2px 0 10px; font-size:30px; line-height:1.2; font-weight:680; letter-spacing:-.015em; }
h2 { margin:0 0 4px; font-size:18px; font-weight:640; letter-spacing:-.005em; }
.facts { list-style:none; margin:0; padding:0; display:flex; flex-wrap:wrap; gap:4px 18px;
  color:var(--muted); font-size:14px; }
section { background:var(--card); border:1px solid var(--line); border-radius:10px;
  padding:20px 24px 22px; margin-bottom:18px; }
.note { margin:0 0 12px; color:var(--muted); font-size:13.5px; max-width:75ch; }
.wide { overflow-x:auto; }
table { border-collapse:collapse; width:100%; font-size:14px; font-variant-numeric:tabular-nums; }
th { text-align:left; font-weight:600; font-size:12.5px; color:var(--muted); white-space:nowrap;
  padding:6px 14px 6px 0; border-bottom:1px solid var(--line); }
td { padding:8px 14px 8px 0; border-bottom:1px solid var(--line); vertical-align:top; }
tr:last-child td { border-bottom:0; }
.numbers td:not(:first-child), .numbers th:not(:first-child) { text-align:right; }
.numbers td:not(:first-child) { white-space:nowrap; }
.numbers th:not(:first-child) { white-space:normal; vertical-align:bottom; min-width:58px; }
.note.more { margin:18px 0 2px; }
.numbers td:last-child, .numbers th:last-child { padding-right:0; }
.numbers td:first-child { font-weight:600; white-space:nowrap; }
.plain td:first-child { white-space:nowrap; }
.dense td { padding-top:4px; padding-bottom:4px; border-bottom-color:transparent; }
.environment { display:flex; flex-wrap:wrap; gap:2px 20px; margin:0; font-size:13.5px; }
.environment b { color:var(--muted); font-weight:400; margin-right:4px; }
.plain td { overflow-wrap:anywhere; }
.claims td:nth-child(2) { min-width:240px; }
.claims td:nth-child(5) { white-space:nowrap; }
.small { display:block; color:var(--muted); font-size:12.5px; font-weight:400; }
.badge { display:inline-block; padding:1px 9px; border-radius:99px; font-size:12.5px;
  font-weight:600; white-space:nowrap; }
.good { color:var(--good); background:var(--good-back); }
.bad { color:var(--bad); background:var(--bad-back); }
.open { color:var(--open); background:var(--open-back); }
.quiet { color:var(--muted); background:var(--quiet-back); }
.chip { display:inline-block; width:11px; height:11px; border-radius:3px; margin-right:7px;
  background:var(--c); }
.legend { display:flex; flex-wrap:wrap; gap:4px 18px; margin:0 0 6px; font-size:14px; }
figure { margin:10px 0 0; }
.wide { grid-column:1 / -1; }
figure svg { width:100%; height:auto; display:block; }
figcaption { color:var(--muted); font-size:13px; text-align:center; margin-top:4px; }
.pair { display:grid; gap:8px 28px;
  grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr)); }
.dots { width:160px; height:20px; }
.dots .zone { fill:var(--good-back); } .dots .rule { stroke:var(--line); }
.dots .bound { stroke:var(--ink); stroke-width:1.4; }
.dots circle { fill:var(--accent); fill-opacity:.75; }
.command, code { font-family:var(--mono); font-size:13px; }
.command { background:var(--quiet-back); border-radius:8px; padding:10px 14px; margin:8px 0 14px;
  overflow-x:auto; }
details { margin-top:12px; } summary { cursor:pointer; color:var(--muted); font-size:13.5px; }
@media print { body { background:#fff; } section { break-inside:avoid; border-color:#ccc; } }
"""
