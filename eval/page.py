# SPDX-License-Identifier: Apache-2.0
"""The page that reports fill in: one file, no script, no request to anywhere."""

import string

PAGE = string.Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root {
  --ground: #f6f7f9; --card: #ffffff; --ink: #1d2126; --soft: #626b76; --line: #e2e6eb;
  --accent: #2f69b8; --good: #25784a; --bad: #b3362f; --warn: #8a5a00;
  --bad-ground: #fdeeed; --warn-ground: #fdf5e3; --good-ground: #eaf6ef; --bar: #3f78c433;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14171b; --card: #1c2026; --ink: #e4e8ec; --soft: #98a2ae; --line: #2e343c;
    --accent: #7fb0ee; --good: #74c996; --bad: #f08a83; --warn: #e6b455;
    --bad-ground: #3a2122; --warn-ground: #362c18; --good-ground: #1b3226; --bar: #6aa0e63d;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  font-variant-numeric: tabular-nums;
}
main { max-width: 1020px; margin: 0 auto; padding: 40px 24px 64px; }
header p { margin: 0; }
.over { color: var(--soft); font-size: 13px; letter-spacing: .02em; }
h1 { font-size: 30px; line-height: 1.2; margin: 4px 0 10px; letter-spacing: -.015em; }
h2 { font-size: 18px; margin: 40px 0 4px; letter-spacing: -.005em; }
.lead { font-size: 17px; max-width: 46em; }
.note { color: var(--soft); font-size: 13.5px; margin: 4px 0 12px; max-width: 56em; }
.banner { border-radius: 10px; padding: 12px 16px; margin: 20px 0 0; }
.banner strong { display: block; }
.banner ul { margin: 4px 0 0; padding-left: 20px; }
.bad { background: var(--bad-ground); } .bad strong { color: var(--bad); }
.warn { background: var(--warn-ground); } .warn strong { color: var(--warn); }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; margin: 24px 0 0; }
@media (max-width: 760px) { .tiles { grid-template-columns: repeat(2, 1fr); } }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.tile { padding: 14px 16px; }
.tile b { display: block; font-size: 25px; line-height: 1.25; font-weight: 650; }
.tile span { color: var(--soft); font-size: 13px; display: block; }
.card { padding: 6px 18px; overflow-x: auto; }
figure { margin: 10px 0 0; }
figure.card { padding: 18px; text-align: center; }
figure img { max-width: 100%; height: auto; image-rendering: auto; }
.pixels img { image-rendering: pixelated; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 12px; }
.pairs figure { margin: 0; padding: 12px; }
figcaption { color: var(--soft); font-size: 13.5px; margin-top: 8px; text-align: left; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: 8px 10px; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { color: var(--soft); font-weight: 600; font-size: 13px; white-space: nowrap; }
tbody th { font-weight: 500; }
td { white-space: nowrap; }
td.good { color: var(--good); } td.worse { color: var(--bad); }
details { margin-top: 12px; }
summary { cursor: pointer; padding: 10px 0; color: var(--accent); font-weight: 550; }
.wide { width: min(1280px, 100vw - 48px); margin-left: 50%; transform: translateX(-50%); }
.layers { font-size: 12.5px; } .layers th, .layers td { padding: 4px 6px; }
.layers th:first-child { white-space: nowrap; }
.layers th:first-child { padding-left: 0; }
.layers tbody th { font: 12px ui-monospace, Menlo, Consolas, monospace; }
.layers thead th { white-space: normal; font-size: 12px; vertical-align: bottom; }
.layers td.meter {
  background: linear-gradient(var(--bar), var(--bar)) no-repeat left center / var(--w) 70%;
}
.layers tfoot :is(th, td) { font-weight: 600; }
.layers tfoot tr:first-child > * { border-top: 1px solid var(--line); }
.layers tfoot tr:last-child > * { border-bottom: 0; }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.facts th { white-space: nowrap; padding-right: 24px; vertical-align: top; }
.scroll { max-height: 480px; overflow: auto; }
.scroll thead th { position: sticky; top: 0; background: var(--card); }
footer { color: var(--soft); font-size: 13px; margin-top: 44px; }
@media print {
  body { background: none; } .card, .tile { break-inside: avoid; }
  .scroll { max-height: none; }
}
</style>
</head>
<body>
<main>
<header>
<p class="over">vqjax · $kind</p>
<h1>$heading</h1>
<p class="lead">$lead</p>
</header>
$banners
<section class="tiles" aria-label="Key figures">
$tiles
</section>
$sections
<footer>$footer</footer>
</main>
</body>
</html>
""")
