"""Render the tables and plots of README.md and docs/ from benchmarks/results/*.json and the metafiles.

A table stands in Markdown between ``<!-- figures: NAME -->`` and ``<!-- /figures -->``.  A file of results may be
replaced or gain rows: what a table lacks it shows as a dash, and a column without any figure is left out.
"""

import argparse
import functools
import json
import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
MARKED = re.compile(r'(<!-- figures: ([\w-]+) -->\n).*?(<!-- /figures -->)', re.DOTALL)
SIZES = dict(tiny='T', small='S', base='B')
EXECUTIONS = dict(eager='eager', compile='compiled', graphs='CUDA graphs')
MODES = dict(infer='inference', train='training')
RUNS = tuple((execution, mode) for execution in EXECUTIONS for mode in MODES)
ARCHS = ('tiny-s1l8', 'small-s1l20', 'base-s1l20', 'tiny-s2l5', 'small-s2l15', 'base-s2l15')
# by a word of their configs' paths, in our folders and in the codebases
TASKS = dict(
    classification='classification',
    mmpretrain='classification',
    detection='detection',
    mmdet='detection',
    segmentation='segmentation',
    mmseg='segmentation',
)
PLAIN = ('export', 'receptive-field', 'resolution')
DEPLOYED = dict(vmamba='VMamba-T', swin='Swin-T', convnext='ConvNeXt-T')
VANILLA = ('tiny-v0', 'small-v0', 'base-v0')
MAMBA2 = ('tiny-m2', 'small-m2', 'base-m2')  # without weights or accuracy


def read(name: str, root: Path = ROOT) -> dict:
    """A file of results."""
    return json.loads((root / 'benchmarks/results' / name).read_text())


def label(model: str) -> str:
    """A reader's name of a benchmark's model, such as ``Swin-T (timm)``."""
    source, _, name = model.rpartition(':')
    short = next((SIZES[size] for size in SIZES if size in name), name[-1].upper())
    if source in ('', 'unfused', 'upstream'):
        kind = name.partition('-')[2].replace('v0', 'vanilla')
        return f'VMamba-{short} {kind}' + dict(unfused=', unfused ops', upstream=', the original').get(source, '')
    if source == 'mambavision':
        return f'MambaVision-{short}'
    return f'{"Swin" if "swin" in name else "ConvNeXt" if "convnext" in name else name}-{short} ({source})'


def caption(report: dict, note: bool = True) -> str:
    """Where a report was measured, and its note."""
    versions = ', '.join(
        f'{title} {report["versions"][name]}'
        for name, title in (('torch', 'torch'), ('cuda', 'CUDA'))
        if name in report['versions']
    )
    words = f' {report["note"]}' if note and 'note' in report else ''
    return f'{report["machine"]}, {versions}, commit {report["commit"]}.{words}'


def table(header: list, rows: list) -> str:
    """A Markdown table without the columns that nothing fills."""
    kept = [i for i in range(len(header)) if any(row[i] not in ('', '–') for row in rows)]
    lines = [header, ['---' if i == kept[0] else '--:' for i in range(len(header))], *rows]
    return '\n'.join(f'| {" | ".join(line[i] for i in kept)} |' for line in lines)


def number(value, digits: int = 0) -> str:
    """A figure with its thousands set apart, or a dash."""
    return '–' if value is None else f'{value:,.{digits}f}'


def find(report: dict, model: str, execution: str, mode: str):
    """The 224-pixel fp16 row of a model, or nothing."""
    wanted = dict(model=model, execution=execution, mode=mode, setting='224', precision='fp16')
    return next((row for row in report['rows'] if wanted.items() <= row.items()), None)


def swin_beside(report: dict, arch: str, execution: str) -> str:
    """The Swin of an arch's size that the report has, the fastest in training; empty if it has none."""
    size = arch.partition('-')[0]
    rows = [
        row
        for row in report['rows']
        if 'swin' in row['model'] and label(row['model']).startswith(f'Swin-{SIZES[size]}')
    ]
    rows = [row for row in rows if row['execution'] == execution and row['setting'] == '224' and row['mode'] == 'train']
    return max(rows, key=lambda row: row['images_per_second'])['model'] if rows else ''


def published(root: Path = ROOT) -> dict:
    """By arch: parameters, FLOPs, top-1 and mIoU, as the metafiles have them."""
    found = {}
    for folder, metric in (('classification', 'Top 1 Accuracy'), ('segmentation', 'mIoU')):
        for model in yaml.safe_load((root / f'configs/{folder}/metafile.yml').read_text())['Models']:
            match = re.match(r'vmamba-(\w+-(?:s\dl\d+|v0|m2))', model['Name'])
            if match is None or '640' in model['Name'] or '896' in model['Name']:
                continue
            if 'Results' not in model and match[1] not in MAMBA2:
                continue
            entry = found.setdefault(match[1], {})
            if 'Results' in model:
                entry[metric] = model['Results'][0]['Metrics'][metric]
            if folder == 'classification':
                entry.update(parameters=model['Metadata']['Parameters'], flops=model['Metadata']['FLOPs'])
    return found


def accuracy_and_speed(root: Path = ROOT) -> str:
    """VMamba beside Swin and MambaVision: published accuracy, and images a second of one run."""
    report, ours, others = read('models.json', root), published(root), read('published.json', root)['rows']
    executions = [name for name in EXECUTIONS if any(row['execution'] == name for row in report['rows'])]
    header = [
        'model',
        'params',
        'top-1',
        'mIoU',
        *(f'{EXECUTIONS[e]}, {m}' for e in executions for m in ('inference', 'training')),
    ]
    header.append('training memory')
    rows = []

    def add(name, parameters, top1, miou, models):
        found = [find(report, models.get(e, ''), e, mode) for e in executions for mode in ('infer', 'train')]
        memory = [row['peak_gib'] for row in found[1::2] if row and row['peak_gib']]
        speeds = [number(row and row['images_per_second']) for row in found]
        rows.append([name, f'{parameters / 1e6:.0f} M', number(top1, 1), number(miou, 1), *speeds])
        rows[-1].append(f'{min(memory):.1f} GiB' if memory else '–')

    for size, short in SIZES.items():
        for arch in ARCHS:
            if arch.startswith(size) and any(row['model'] == arch for row in report['rows']):
                entry = ours[arch]
                name = f'**VMamba-{short}** {arch.partition("-")[2]}'
                add(
                    name,
                    entry['parameters'],
                    entry['Top 1 Accuracy'],
                    entry.get('mIoU'),
                    dict.fromkeys(executions, arch),
                )
                beside = {e: swin_beside(report, arch, e) for e in executions}
        for other in others:
            if other['model'].endswith(f'-{short}'):
                models = beside if other['model'].startswith('Swin') else {}
                add(other['model'], other['parameters'], other['top1'], other['miou'], models)
    return f'{table(header, rows)}\n\nImages/s, fp16, batch 128 at 224. {caption(report, note=False)}'


def models(report: dict) -> str:
    """Every row of a report of tools/benchmark/models.py, inference and training side by side."""
    header = ['model', 'setting', 'run', 'inference, images/s', 'training, images/s', 'training memory', 'times Swin']
    keys = dict.fromkeys((row['model'], row['setting'], row['execution']) for row in report['rows'])
    rows = []
    for model, setting, execution in keys:
        both = {
            r['mode']: r
            for r in report['rows']
            if (r['model'], r['setting'], r['execution']) == (model, setting, execution)
        }
        speed = {mode: row['images_per_second'] for mode, row in both.items()}
        memory = both.get('train', {}).get('peak_gib')
        ratio = ''
        beside = swin_beside(report, model, execution) if ':' not in model and setting == '224' else ''
        if beside:
            swin = {mode: find(report, beside, execution, mode) for mode in speed}
            ratio = ' / '.join(f'{speed[m] / row["images_per_second"]:.2f}' for m, row in swin.items() if row)
        figures = [number(speed.get('infer')), number(speed.get('train')), f'{memory:.1f} GiB' if memory else '–']
        rows.append([label(model), setting, EXECUTIONS[execution], *figures, ratio])
    spreads = [(row['execution'], row['mode'], row.get('spread') or 0) for row in report['rows']]
    worst = [max((s for e, m, s in spreads if (e, m) == kind), default=0) for kind in RUNS]
    words = [f'{100 * s:.0f} % ({EXECUTIONS[e]}, {MODES[m]})' for (e, m), s in zip(RUNS, worst) if s]
    repeats = f' Repeats differ by up to {", ".join(words)}.' if words else ''
    return f'{table(header, rows)}\n\n{caption(report)}{repeats}'


def training(report: dict) -> str:
    """The rows of a report of tools/benchmark/training.py, by task."""
    header = ['task', 'run', 'ms an iteration', 'images/s', 'GPU busy']
    header += ['of bare eager', 'of bare compiled', 'times Swin']
    rows = []
    for row in report['rows']:
        task = next((TASKS[name] for name in TASKS if name in row['config']), '')
        shares = [row.get(key) for key in ('busy', 'of_bare_eager', 'of_bare_compiled')]
        figures = [number(row['iteration_ms'], 1), number(row['images_per_second'])]
        figures += ['–' if share is None else f'{share:.0%}' for share in shares]
        rows.append([task, row['name'], *figures, f'{row["speed_ratio"]:.2f}'])
    return f'{table(header, rows)}\n\n{caption(report)}'


def core(report: dict) -> str:
    """The rows of ss2d_scan of a report of tools/benchmark/ops.py: forward, then forward and backward."""
    rows = [row for row in report['rows'] if row['op'] == 'ss2d_scan']
    backends = list(dict.fromkeys(row['backend'] for row in rows))
    cells = {(row['shape'], row['backend']): f'{row["forward_ms"]:.3g} / {row["total_ms"]:.3g}' for row in rows}
    lines = []
    for shape in dict.fromkeys(row['shape'] for row in rows):
        sides = ', '.join(shape.split('x')[:4])
        lines.append([sides, *(cells.get((shape, backend), '–') for backend in backends)])
    return f'{table(["batch, channels, height, width", *backends], lines)}\n\n{report["dtype"]}. {caption(report)}'


def mmcv_ops(report: dict) -> str:
    """A report of tools/benchmark/mmcv_ops.py."""
    header = ['op', 'compiled mmcv, ms', 'stand-in, ms', 'ratio', 'relative difference']
    rows = [
        [row['op'], f'{row["compiled"]:.3g}', f'{row["stand_in"]:.3g}', f'{row["ratio"]:.2f}', f'{row["error"]:.1e}']
        for row in report['rows']
    ]
    return f'{table(header, rows)}\n\n{report["dtype"]}. {caption(report)}'


def earlier(root: Path = ROOT) -> str:
    """Every report in benchmarks/results/earlier."""
    parts = []
    for path in sorted((root / 'benchmarks/results/earlier').glob('*.json')):
        report = json.loads(path.read_text())
        gpu, _, subject = path.stem.partition('-')
        parts.append(f'### {gpu.upper()}: {subject}\n\n{core(report) if "ops" in path.stem else models(report)}')
    return '\n\n'.join(parts)


def archs(root: Path = ROOT) -> str:
    """The published archs, from the metafiles."""
    from mmvmamba.models.archs import ARCHS as OPTIONS

    found, rows = published(root), []
    header = ['`arch`', 'blocks', 'channels', '`ssm_ratio`', 'parameters', 'FLOPs at 224', 'top-1', 'mIoU']
    for arch in (*ARCHS, *VANILLA, *MAMBA2):
        entry, arch_options = found[arch], OPTIONS[arch]
        row = [f'`{arch}`', ', '.join(map(str, arch_options['depths'])), str(arch_options['dims'])]
        row += [f'{arch_options.get("ssm_ratio", 1.0):g}', f'{entry["parameters"]:,}', f'{entry["flops"] / 1e9:.2f} G']
        rows.append([*row, *(str(entry.get(metric, '–')) for metric in ('Top 1 Accuracy', 'mIoU'))])
    return table(header, rows)


def published_speed(root: Path = ROOT) -> str:
    """Images a second as published, beside those of our run, on another machine."""
    theirs, report = read('published.json', root)['throughput'], read('models.json', root)
    header = ['model', 'inference, published', 'training, published']
    header += [f'{mode}, measured here' for mode in MODES.values()]
    rows = []
    for row in theirs['rows']:
        size = next((size for size in SIZES if row['model'] == f'Swin-{SIZES[size]}'), None)
        ours = swin_beside(report, f'{size}-', 'eager') if size else row['model']
        measured = [find(report, ours, 'eager', mode) for mode in MODES]
        name = row['model'] if size else f'`{row["model"]}`'
        figures = [number(row['inference']), number(row['training'])]
        rows.append([name, *figures, *(number(found and found['images_per_second']) for found in measured)])
    return (
        f'{table(header, rows)}\n\nImages/s on different machines, not to be compared across. '
        f'[Published]({theirs["source"]}): {theirs["machine"]}. Here: eager, fp16, batch 128 at 224. '
        f'{caption(report, note=False)}'
    )


def versions(root: Path = ROOT) -> str:
    """The versions that are tested: the rows of matrix.json, or the pinned set."""
    files = [root / f'requirements/{name}.txt' for name in ('tested', 'torch', 'mmcv-lite')]
    lines = [line for file in files if file.exists() for line in file.read_text().splitlines()]
    pins = dict(line.split('==') for line in lines if re.match(r'[\w-]+==', line))
    names = ('torch', 'mmengine', 'mmcv-lite', 'mmpretrain', 'mmdet', 'mmsegmentation', 'numpy')
    names = [name for name in names if name in pins]
    path = root / 'benchmarks/results/matrix.json'
    if not path.exists():
        return table(['Python', *names], [['3.11', *(pins[name] for name in names)]])
    report = json.loads(path.read_text())
    header = [key for key in dict.fromkeys(key for row in report['rows'] for key in row) if key != 'remarks']
    rows = [[str(row.get(key, '–')) for key in header] for row in report['rows']]
    failed = [row for row in report['rows'] if row.get('remarks')]
    remarks = [f'- Python {row["Python"]}, torch {row["torch"]}: {row["remarks"]}' for row in failed]
    pinned = ', '.join(f'{name} {pins[name]}' for name in names)
    words = f'{report["machine"]}. `make setup` installs, and all tests run with: Python 3.11, {pinned}.'
    return '\n'.join([table(header, rows), '', *remarks, *([''] if remarks else []), words])


def versions_in_brief(root: Path = ROOT) -> str:
    """The sets of versions in which everything works, one a row."""
    path = root / 'benchmarks/results/matrix.json'
    if not path.exists():
        return versions(root)
    names = ('Python', 'torch', 'numpy', 'mmengine', 'mmdet', 'mmseg', 'mmpretrain')
    rows = [row for row in json.loads(path.read_text())['rows'] if not row.get('remarks')]
    return table(list(names), [[str(row.get(name, '–')) for name in names] for row in rows])


def deploy(report: dict) -> str:
    """Milliseconds an image of each form of a model, and in brackets what part of the first model's in torch eager."""
    rows = report['rows']
    settings = list(dict.fromkeys((row['size'], row['batch']) for row in rows))
    header = ['model', 'form', *(f'{size} px, batch {batch}' for size, batch in settings)]
    lines = []
    for model, form in dict.fromkeys((row['model'], row['form']) for row in rows):
        own = {(r['size'], r['batch']): r for r in rows if (r['model'], r['form']) == (model, form)}
        cells = [own.get(key) for key in settings]
        speeds = [f'{cell["cpu_ms"]:.1f} ({cell["ratio"]:.2f})' if cell else '–' for cell in cells]
        largest = [
            max((row[key] for row in own.values() if row[key] is not None), default=None)
            for key in ('file_mib', 'load_s', 'error')
        ]
        error = '–' if not largest[2] else f'{largest[2]:.0e}'
        lines.append([DEPLOYED[model.split('_')[0]], form, *speeds, *(number(v, 1) for v in largest[:2]), error])
    return f'{table([*header, "file, MiB", "loading, s", "largest error"], lines)}\n\n{caption(report)}'


def as_it_is(report: dict) -> str:
    """The rows of a report whose keys are the header."""
    header = list(report['rows'][0])
    return f'{table(header, [[row[key] for key in header] for row in report["rows"]])}\n\n{caption(report, note=False)}'


TABLES = {
    'accuracy-and-speed': accuracy_and_speed,
    'models': lambda: models(read('models.json')),
    'training': lambda: training(read('training.json')),
    'core': lambda: core(read('ops.json')),
    'core-cpu': lambda: core(read('ops-cpu.json')),
    'mmcv-ops': lambda: mmcv_ops(read('mmcv-ops.json')),
    'earlier': earlier,
    'archs': archs,
    'published-speed': published_speed,
    'tested': versions,
    'deploy': lambda: deploy(read('deploy.json')),
    'tested-brief': versions_in_brief,
    **{name: functools.partial(lambda name: as_it_is(read(f'{name}.json')), name) for name in PLAIN},
}


def bars(report: dict) -> str:
    """An SVG of images a second, VMamba and its Swin, in the run that has most pairs."""
    pairs = []
    for execution in reversed(EXECUTIONS):
        archs = [
            arch for arch in ARCHS if find(report, arch, execution, 'train') and swin_beside(report, arch, execution)
        ]
        pairs = max(pairs, [(arch, execution) for arch in archs], key=len)
    panels = []
    for mode, title in (('infer', 'inference'), ('train', 'training')):
        rows = [find(report, name, e, mode) for arch, e in pairs for name in (arch, swin_beside(report, arch, e))]
        panels.append((title, [row for row in rows if row]))
    height = 40 + 26 * max(len(rows) for _, rows in panels)
    run = EXECUTIONS[pairs[0][1]]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="13"><title>Images a second, {run}</title>'
        '<style>text{fill:#4b5563}.v{fill:#7c3aed}.s{fill:#9ca3af}'
        '@media(prefers-color-scheme:dark){text{fill:#cbd5e1}}</style>'
    ]
    for i, (title, rows) in enumerate(panels):
        left, most = 380 * i, max(row['images_per_second'] for row in rows)
        parts.append(f'<text x="{left}" y="18" font-weight="600">{title}, images/s ({run}, {report["machine"]})</text>')
        for j, row in enumerate(rows):
            y, width = 32 + 26 * j, 190 * row['images_per_second'] / most
            name, color = label(row['model']).partition(' ')[0], 's' if ':' in row['model'] else 'v'
            parts.append(
                f'<text x="{left + 75}" y="{y + 14}" text-anchor="end">{name}</text>'
                f'<rect class="{color}" x="{left + 83}" y="{y}" width="{width:.1f}" height="19" rx="3"/>'
                f'<text x="{left + 89 + width:.1f}" y="{y + 14}">{row["images_per_second"]:,.0f}</text>'
            )
    return '\n'.join([*parts, '</svg>\n'])


PLOTS = {'docs/pictures/speed.svg': lambda: bars(read('models.json'))}


def render(text: str) -> str:
    """A page with every table anew."""
    return MARKED.sub(lambda match: f'{match[1]}{TABLES[match[2]]()}\n{match[3]}', text)


def outdated() -> dict:
    """The pages and plots that differ from what the files give, with what they should be."""
    pages = [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md'))]
    wanted = {path: render(path.read_text()) for path in pages}
    wanted.update({ROOT / name: draw() for name, draw in PLOTS.items()})
    return {path: text for path, text in wanted.items() if not path.exists() or path.read_text() != text}


def main(argv=None) -> int:
    """Write what is out of date; with --check only name it, and return 1 if there is any."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--check', action='store_true', help='write nothing; fail if a page is out of date')
    args = parser.parse_args(argv)
    found = outdated()
    for path, text in found.items():
        print(f'{"out of date" if args.check else "wrote"}: {path.relative_to(ROOT)}')
        if not args.check:
            path.write_text(text)
    return int(args.check and bool(found))


if __name__ == '__main__':
    sys.exit(main())
