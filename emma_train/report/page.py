"""The page around a report: its style, its script, and a content security policy that forbids loading anything."""

import json
from html import escape
from typing import Any

# Colours of lines after Okabe and Ito, which differ for every kind of colour vision; lighter ones on a dark page.
STYLE = """
:root{--paper:#faf9f6;--card:#fff;--ink:#1c1e21;--soft:#62666d;--hair:#e5e2db;--tint:#f3f1ec;
--blue:#0072b2;--red:#d55e00;--green:#00805d;--pink:#b0588a;--gold:#b57c00;--shadow:0 1px 2px rgba(30,25,15,.05)}
@media (prefers-color-scheme:dark){:root{--paper:#121416;--card:#1a1d20;--ink:#ebe9e4;--soft:#9ba1a8;--hair:#2d3136;
--tint:#22262a;--blue:#5bb8ec;--red:#f58b4c;--green:#2fc398;--pink:#e0a0c6;--gold:#e9b44c;--shadow:none}}
*{box-sizing:border-box}
html{color-scheme:light dark;scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 ui-sans-serif,system-ui,-apple-system,"Segoe UI",
Roboto,"Helvetica Neue",Arial,"Liberation Sans",sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1120px;margin:0 auto;padding:64px 32px 96px}
h1,h2,h3,p,dl,dd,ul,figure{margin:0;padding:0}
h1{font-size:clamp(34px,6vw,52px);line-height:1.08;letter-spacing:-.028em;font-weight:680;overflow-wrap:anywhere}
h2{font-size:24px;letter-spacing:-.015em;font-weight:650;line-height:1.25}
h3{font-size:15px;font-weight:620;line-height:1.35}
.overline{color:var(--soft);font-size:13px;letter-spacing:.08em;text-transform:uppercase;margin-bottom:14px}
.lead{font-size:20px;line-height:1.5;color:var(--soft);max-width:44em;margin-top:20px}
.lead b{color:var(--ink);font-weight:600}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(126px,1fr));gap:20px 24px;margin-top:36px;
padding-top:24px;border-top:1px solid var(--hair)}
.facts .wide{grid-column:span 2}
.facts dt{font-size:13px;color:var(--soft)}
.facts dd{font-weight:560;overflow-wrap:anywhere}
section{margin-top:72px}
section>h2+p{color:var(--soft);margin-top:6px;max-width:46em}
section>h2~div,section>h2~figure{margin-top:24px}
.card,.chart,.tile{background:var(--card);border:1px solid var(--hair);border-radius:14px;box-shadow:var(--shadow)}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(238px,1fr));gap:16px}
.tile{padding:18px 18px 16px;display:flex;flex-direction:column;overflow:hidden}
.tile .spark{height:52px;margin:12px -18px 10px;width:calc(100% + 36px)}
.tile .big{font-size:23px;font-weight:640;letter-spacing:-.02em;line-height:1.2}
.tile .big span{color:var(--soft);font-weight:400;padding:0 .25em;display:inline-block}
.tile small,.tile .plain{font-size:13px;color:var(--soft)}
.chips{list-style:none;display:flex;flex-wrap:wrap;gap:6px;margin-top:12px}
.chips li{font-size:12.5px;line-height:1;padding:5px 8px;border-radius:99px;background:var(--tint)}
.chips li span{color:var(--soft)}
.frozen-check{margin-top:auto;padding-top:12px;font-size:13px}
.ok{color:var(--green)}.bad{color:var(--red)}
.charts{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:16px}
.chart{padding:20px 22px 14px;min-width:0}
.chart+.chart.tall{margin-top:16px}
figcaption{display:flex;flex-wrap:wrap;gap:6px 20px;align-items:flex-start}
figcaption>div{flex:1 1 220px;min-width:0}
figcaption p{font-size:13px;color:var(--soft);line-height:1.45}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 16px;font-size:13px}
.legend li::before{content:"";display:inline-block;width:16px;height:3px;border-radius:2px;background:var(--c);
margin-right:7px;vertical-align:.28em}
.legend .dot::before{height:10px;width:10px;vertical-align:-.02em}
.switch{font-size:13px;color:var(--soft);cursor:pointer;display:flex;gap:6px;align-items:center;user-select:none}
.switch input{accent-color:var(--blue);margin:0}
.plot{position:relative;padding:0 0 24px 46px;margin-top:14px}
.area{position:relative;height:170px;touch-action:pan-y}
.tall .area{height:330px}
.area svg{position:absolute;inset:0;width:100%;height:100%;overflow:hidden;display:block}
.ys{position:absolute;left:0;top:0;bottom:24px;width:38px}
.plot i{font-style:normal;font-size:12px;color:var(--soft);position:absolute;line-height:1;white-space:nowrap}
.ys i{right:0;transform:translateY(-50%)}
.xs{position:absolute;left:46px;right:0;bottom:0;height:16px}
.xs i{transform:translateX(-50%)}
.xs i:first-child{transform:none}
.bands{position:absolute;inset:0;pointer-events:none}
.bands span{position:absolute;top:6px;padding:0 6px;font-size:12px;line-height:1.3;color:var(--soft);overflow:hidden;
white-space:nowrap}
.bands b{font-weight:400}
.bands .wide b+b,.bands .some b+b,.bands .tight b:first-child,.bands .none b{display:none}
.chart:not(.linear):has(input:checked) .lin,.chart:not(.linear):not(:has(input:checked)) .log{display:none}
path{fill:none;vector-effect:non-scaling-stroke}
.grid{stroke:var(--hair);stroke-width:1}
.band{fill:var(--ink);opacity:.032}
.line{stroke:var(--c);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.raw{stroke:var(--c);stroke-width:1;opacity:.26;stroke-linejoin:round}
.fill{fill:var(--c);opacity:.09;stroke:none}
.c-ink{--c:var(--ink)}.c-blue{--c:var(--blue)}.c-red{--c:var(--red)}.c-green{--c:var(--green)}.c-pink{--c:var(--pink)}
.c-gold{--c:var(--gold)}.c-soft{--c:var(--soft)}.c-hair{--c:var(--hair)}
.restart{stroke:var(--soft);stroke-width:1;stroke-dasharray:2 4;opacity:.75}
.ranks{position:absolute;inset:0;pointer-events:none}
.ranks span{position:absolute;bottom:4px;padding:0 5px;font-size:11px;line-height:1.3;color:var(--soft);
white-space:nowrap}
.plot .cursor{display:none;top:0;bottom:0;width:1px;background:var(--soft);opacity:.6;pointer-events:none}
#tip{position:fixed;z-index:9;pointer-events:none;display:none;background:var(--card);border:1px solid var(--hair);
border-radius:10px;padding:9px 12px;font-size:13px;line-height:1.5;box-shadow:0 6px 24px rgba(0,0,0,.14);
min-width:150px}
#tip p{display:flex;gap:8px;align-items:center}
#tip p::before{content:"";width:9px;height:9px;border-radius:3px;background:var(--c)}
#tip p b{margin-left:auto;padding-left:12px;font-weight:600}
#tip small{color:var(--soft);display:block;font-size:12px}
.scores{padding:8px 24px}
.score{display:grid;grid-template-columns:minmax(180px,1.1fr) 2fr minmax(120px,auto);gap:4px 28px;align-items:center;
padding:15px 0;border-top:1px solid var(--hair)}
.score:first-child{border-top:0}
.gauge p{margin-top:9px}
.score p{font-size:13px;color:var(--soft)}
.score .value{text-align:right}
.score .value b{font-size:20px;font-weight:640;letter-spacing:-.01em}
.track{position:relative;height:10px;border-radius:5px;background:var(--tint)}
.track b{position:absolute;left:0;top:0;bottom:0;border-radius:5px;background:var(--blue)}
.track.met b{background:var(--green)}.track.missed b{background:var(--red)}
.track i{position:absolute;top:-6px;bottom:-6px;width:2px;margin-left:-1px;background:var(--ink);border-radius:1px;
box-shadow:0 0 0 2px var(--card)}
.track i.goal::before{content:"";position:absolute;left:-3px;top:-4px;border:4px solid transparent;
border-top:6px solid var(--ink)}
.track i.base{top:-2px;bottom:-2px;background:var(--soft)}
.key{display:flex;flex-wrap:wrap;gap:4px 20px;font-size:13px;color:var(--soft);margin-top:12px}
.image-grid{overflow-x:auto;padding:20px 24px 22px}
.image-grid h3{margin-bottom:12px;position:sticky;left:0}
.scrolls h3::after{content:"scroll for more →";float:right;font-weight:400;font-size:13px;color:var(--soft)}
.scrolls{-webkit-mask-image:linear-gradient(90deg,#000 calc(100% - 40px),#0004);
mask-image:linear-gradient(90deg,#000 calc(100% - 40px),#0004)}
.image-grid+.image-grid,.image-grid+.answers,.answers+.image-grid{margin-top:16px}
table{border-collapse:collapse;font-size:13px}
.image-grid th{font-weight:400;color:var(--soft);text-align:left;padding:0 8px 6px 0;white-space:nowrap;
vertical-align:bottom}
.image-grid tbody th{white-space:normal;min-width:150px;max-width:210px;padding:6px 20px 6px 0;color:var(--ink);
vertical-align:middle;line-height:1.4;overflow-wrap:anywhere}
.image-grid td{padding:4px 8px 4px 0;color:var(--soft)}
.image-grid th.stage{color:var(--ink);font-weight:600}
.image-grid .apart{padding-left:16px}
.image-grid img,.answer img{display:block;border-radius:8px;background:var(--tint);object-fit:contain}
.image-grid img{width:96px;height:96px}
.image-grid img.sheet{width:auto;height:auto;max-width:max(100%,800px);border-radius:0}
.answers{display:grid;grid-template-columns:repeat(auto-fill,minmax(310px,1fr));gap:16px}
.answer{padding:16px;display:grid;grid-template-columns:96px 1fr;gap:16px;align-items:start;font-size:14px}
.answer img{width:96px;height:96px}
.answer h3{margin-bottom:6px;overflow-wrap:anywhere}
.answer ol{list-style:none;margin:0;padding:0}
.answer li{display:flex;gap:8px;line-height:1.5}
.answer li span{color:var(--soft);flex:none;min-width:5.4em;font-size:13px}
.answer li q{quotes:none;overflow-wrap:anywhere}
.answer .truth{color:var(--soft);font-size:13px;margin-top:6px}
.times{padding:20px 24px}
.timerow{display:grid;grid-template-columns:130px 1fr 310px;gap:18px;align-items:center;padding:7px 0;font-size:14px}
.split{display:flex;height:12px;gap:1px}
.split b{background:var(--c);min-width:1px}
.split b:first-child{border-radius:4px 0 0 4px}.split b:last-child{border-radius:0 4px 4px 0}
.timerow em{font-style:normal;font-weight:560;display:flex;gap:12px;align-items:baseline}
.timerow small{color:var(--soft);font-weight:400;font-size:12.5px}
details{border-top:1px solid var(--hair)}
details:last-of-type{border-bottom:1px solid var(--hair)}
summary{cursor:pointer;padding:13px 0;font-weight:560}
pre{margin:0 0 16px;padding:16px 18px;background:var(--tint);border-radius:10px;overflow:auto;max-height:480px;
font:13px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
.note{color:var(--soft);font-size:14px;margin-top:14px;max-width:60em}
.alarm{border-left:3px solid var(--red);padding:8px 14px;background:var(--tint);border-radius:0 8px 8px 0;
margin:20px 0}
.missing{padding:18px 24px 18px 40px;color:var(--soft);font-size:14px}
footer{margin-top:80px;color:var(--soft);font-size:13px}
@media (max-width:760px){main{padding:36px 18px 64px}section{margin-top:52px}
.charts{grid-template-columns:minmax(0,1fr)}
.lead{font-size:18px}.chart{padding:16px 14px 12px}.tall .area{height:240px}.score{grid-template-columns:1fr auto}
.score .gauge{grid-column:1/-1;grid-row:2;margin-top:12px}
.ranks .near{display:none}.bands .some b:first-child,.bands .tight b{display:none}.bands .some b+b{display:inline}
.facts{grid-template-columns:1fr 1fr}.scores,.image-grid,.times{padding-left:16px;padding-right:16px}
.timerow{grid-template-columns:1fr auto;gap:4px 12px}.timerow .split{grid-column:1/-1;grid-row:2}
.timerow small{display:none}
.image-grid tbody th{min-width:110px;padding-right:12px}.image-grid img{width:80px;height:80px}}
@media print{:root{--paper:#fff;--shadow:none}body{font-size:11pt}main{max-width:none;padding:0}section{margin-top:32px}
.switch,#tip{display:none}.tile,.chart,.answer,.score,tr,.timerow{break-inside:avoid}h2,h3{break-after:avoid}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}pre{max-height:none;white-space:pre-wrap}
.image-grid{overflow:visible}}
@media (prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
"""

# Shows one cursor on all charts at the pointer's step, as they share their x axis, and the values of the chart there.
SCRIPT = """
(function(){
var data=JSON.parse(document.getElementById('data').textContent),tip=document.getElementById('tip');
var cursors=document.querySelectorAll('.cursor');
function fmt(v){if(v===null||v===undefined)return'–';var a=Math.abs(v);if(a===0)return'0';
if(a<1e-3)return v.toExponential(2);
if(a>=1e6)return(v/1e6).toPrecision(3)+'M';if(a>=1e4)return(v/1e3).toPrecision(3)+'k';
return String(Number(v.toPrecision(4)))}
function nearest(x){var lo=0,hi=data.x.length-1;while(hi-lo>1){var m=(lo+hi)>>1;if(data.x[m]<x)lo=m;else hi=m}
return Math.abs(data.x[lo]-x)<Math.abs(data.x[hi]-x)?lo:hi}
function hide(){tip.style.display='none';cursors.forEach(function(c){c.style.display='none'})}
function line(tag,text,parent){var e=document.createElement(tag);e.textContent=text;parent.appendChild(e);return e}
document.querySelectorAll('[data-chart]').forEach(function(chart){
var area=chart.querySelector('.area'),lines=data.charts[chart.dataset.chart];
if(!area||!lines||!data.x.length)return;
function show(e){var box=area.getBoundingClientRect();
var i=nearest((e.clientX-box.left)/box.width*data.end),left=data.x[i]/data.end*100+'%';
cursors.forEach(function(c){c.style.display='block';c.style.left=left});
tip.textContent='';line('b',data.stages[data.stage[i]]+' · step '+data.step[i].toLocaleString('en'),tip);
lines.forEach(function(s){var p=document.createElement('p');p.className=s.color;
p.appendChild(document.createTextNode(s.name));
if((s.y[i]===null||s.y[i]===undefined)&&(!s.mean||s.mean[i]===null))return;
line('b',fmt(s.y[i]),p);tip.appendChild(p);if(s.mean)line('small','smoothed '+fmt(s.mean[i]),tip)});
tip.style.display='block';var w=tip.offsetWidth,h=tip.offsetHeight;
var x=e.clientX+16+w>innerWidth?e.clientX-16-w:e.clientX+16;
tip.style.left=Math.max(4,x)+'px';tip.style.top=Math.max(4,Math.min(e.clientY-h/2,innerHeight-h-4))+'px'}
area.addEventListener('pointermove',show);area.addEventListener('pointerdown',show);
area.addEventListener('pointerleave',hide)});
addEventListener('scroll',hide,{passive:true});
document.querySelectorAll('.image-grid').forEach(function(grid){
function hint(){grid.classList.toggle('scrolls',grid.scrollLeft+grid.clientWidth<grid.scrollWidth-8)}
grid.addEventListener('scroll',hint,{passive:true});addEventListener('resize',hint);hint()});
})();
"""


def html_page(title: str, body: str, data: dict[str, Any]) -> str:
    """A complete HTML document. body: HTML of the main part. data: what the script reads, see `SCRIPT`."""
    payload = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'; img-src data:\">"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>{body}</main>"
        f'<div id="tip" aria-hidden="true"></div><script type="application/json" id="data">{payload}</script>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def html_section(key: str, title: str, note: str, body: str) -> str:
    """One part of the page. title, note: plain text; body: HTML."""
    return f'<section id="{key}"><h2>{escape(title)}</h2><p>{escape(note)}</p>{body}</section>'
