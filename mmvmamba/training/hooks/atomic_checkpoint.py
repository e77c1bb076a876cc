"""Checkpoints that a killed run can trust."""

import os
import re
from collections import deque
from pathlib import Path
from typing import Optional

from mmengine.dist import barrier, is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook
from mmengine.runner import EpochBasedTrainLoop

from mmvmamba.checkpoint import CheckpointError, find_damage
from mmvmamba.checkpoint.whole import PART, commit, remove, write_whole
from mmvmamba.registry import register_hook

# in the message hub, which is part of a checkpoint; what begins with 'val' there is printed with every validation
_VALIDATED = 'last_iter_validated'


@register_hook
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook``, in its place (``default_hooks.checkpoint``), for runs that may be killed.

    - A checkpoint is written under a temporary name, brought to disk and renamed: a file with a checkpoint's name is
      whole. What it replaces (``max_keep_ckpts``, the former best) is removed afterwards, not before.
    - Resuming checks the checksums of the file first. From a damaged one it goes back to the newest whole one, and
      stops if there is none; it never starts over silently.
    - mmengine saves before it validates, so a checkpoint may not know the score of its own weights. A resumed run makes
      up for that validation: no best model is lost, and schedules that follow the score go on as they would have.
    - A configuration saved inside a checkpoint is Python code that mmengine would run on resuming: it is left out.

    Arguments are those of ``CheckpointHook``. Storage other than local files stores objects whole by itself.
    """

    keep_ckpt_ids: deque

    def before_run(self, runner) -> None:
        """Before mmengine resumes, see that what it resumes from is whole."""
        if not runner._resume:
            return
        if runner._load_from is not None:
            path = os.path.expanduser(str(runner._load_from))
            if '://' not in path and os.path.isfile(path):
                _check(path, 'choose another one')
            return
        try:
            if is_main_process():
                self._point_to_whole_checkpoint(runner)
        finally:
            barrier()

    def before_train(self, runner) -> None:
        super().before_train(runner)
        if is_main_process() and self._is_local():
            for part in Path(self.out_dir).glob('*' + PART):
                remove(str(part))  # of a run that was killed
        loop, seen = runner.train_loop, runner.message_hub.runtime_info.get(_VALIDATED)
        done = runner.epoch if isinstance(loop, EpochBasedTrainLoop) else runner.iter
        if not runner._resume or done == 0 or runner.val_loop is None or seen == runner.iter:
            return
        loop._decide_current_val_interval()
        last = loop.max_epochs if isinstance(loop, EpochBasedTrainLoop) else loop.max_iters
        if done >= loop.val_begin and (done % loop.val_interval == 0 or done == last):
            runner.logger.info(f'Validating the weights that were resumed, of iteration {runner.iter}')
            # mmengine writes a file again for the best score's sake only if it remembers to have written one
            self.last_ckpt = runner.message_hub.runtime_info.get('last_ckpt')
            runner.val_loop.run()

    def after_val_epoch(self, runner, metrics) -> None:
        runner.message_hub.update_info(_VALIDATED, runner.iter)
        super().after_val_epoch(runner, metrics)

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Drop the code that mmengine runs from a checkpoint's ``meta``; it only served to compare numbers of GPUs."""
        meta = checkpoint.get('meta')
        if isinstance(meta, dict) and meta.pop('config', None) is not None:
            runner.logger.warning('The checkpoint holds a config as Python code, which is not run.')

    def _save_checkpoint_with_step(self, runner, step, meta) -> None:
        outdated = []
        if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids:
            kept = [*self.keep_ckpt_ids, step]
            outdated = kept[: -self.max_keep_ckpts]
            self.keep_ckpt_ids = deque(kept[-self.max_keep_ckpts :], self.max_keep_ckpts)
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        self._committing(runner).save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            write_whole(Path(runner.work_dir) / 'last_checkpoint', self.last_ckpt.encode())
            for old in outdated:
                self._remove(self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(old)))

    def _save_best_checkpoint(self, runner, metrics) -> None:
        if not self.save_best:
            return
        single = len(self.key_indicators) == 1
        previous = {'': self.best_ckpt_path} if single else dict(self.best_ckpt_path_dict)
        # the base class removes the former best before it writes the new one, unless it knows of none
        self._set_best(dict.fromkeys(previous))
        super()._save_best_checkpoint(self._committing(runner), metrics)
        current = {'': self.best_ckpt_path} if single else dict(self.best_ckpt_path_dict)
        self._set_best({key: current[key] or path for key, path in previous.items()})
        if is_main_process():
            for key, path in previous.items():
                if path and current[key] not in (None, path):
                    self._remove(path)

    def _set_best(self, paths: dict) -> None:
        if '' in paths:
            self.best_ckpt_path = paths['']
        else:
            self.best_ckpt_path_dict = paths

    def _is_local(self) -> bool:
        return isinstance(self.file_backend, LocalBackend) or self.file_client_args is not None

    def _committing(self, runner):
        return _Committing(runner) if self._is_local() and not isinstance(runner, _Committing) else runner

    def _remove(self, path: str) -> None:
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)
        elif self.file_backend.isdir(path):
            self.file_backend.rmtree(path)

    def _point_to_whole_checkpoint(self, runner) -> None:
        """Let ``last_checkpoint``, which mmengine reads, name a whole checkpoint."""
        pointer = Path(runner.work_dir) / 'last_checkpoint'
        named = pointer.read_text().strip() if pointer.is_file() else ''
        if '://' in named:
            return
        candidates = self._best_first(runner, named)
        damaged = []
        for path in candidates:
            damage = '' if path.is_dir() else find_damage(str(path))
            if damage:
                damaged.append(f'{path} ({damage})')
                continue
            if str(path) != named:
                problem = f'skipped {", ".join(damaged)}' if damaged else f'last_checkpoint names {named!r}'
                runner.logger.warning(f'Resuming from {path}, the newest whole checkpoint; {problem}')
                write_whole(pointer, str(path).encode())
            return
        if damaged or named:
            found = ', '.join(damaged) or f'last_checkpoint names {named!r}, which is not there'
            raise CheckpointError(
                f'no whole checkpoint to resume from in {runner.work_dir}: {found}; remove these and last_checkpoint '
                'to start from the beginning'
            )

    def _best_first(self, runner, named: str) -> list:
        """What to resume from, the best first: by number, since a kill may come between a file and ``last_checkpoint``.

        A file that ``last_checkpoint`` names elsewhere or by another name was chosen, and comes first. Higher numbers
        that are older than the file it names are of an earlier run in the same folder, and come last.
        """
        folders = {Path(runner.work_dir).resolve()}
        if self.out_dir is not None:
            folders.add((Path(self.out_dir) / Path(runner.work_dir).name).resolve())
        pattern = re.compile(re.sub(r'\\\{.*?\\\}', r'(\\d+)', re.escape(self.filename_tmpl)))

        def number(path):
            match = pattern.fullmatch(path.name)
            return match and int(match[1] if pattern.groups else 0)

        pointed = Path(named).parent.resolve() / Path(named).name
        present = bool(named) and pointed.exists()
        chosen = present and (pointed.parent not in folders or number(pointed) is None)
        if named:
            folders.add(pointed.parent)

        def rank(path):
            own, changed = path == pointed, path.stat().st_mtime_ns
            earlier = present and not chosen and number(path) > number(pointed)
            return not (earlier and changed < pointed.stat().st_mtime_ns), number(path), own, changed

        found = [path for folder in folders for path in folder.glob('*') if number(path) is not None]
        found.sort(key=rank, reverse=True)
        if chosen:
            found = [pointed, *(path for path in found if path != pointed)]
        return [Path(named) if path == pointed else path for path in found]


class _Committing:
    """A runner whose checkpoints get their names when they are whole."""

    def __init__(self, runner):
        self._runner = runner

    def __getattr__(self, name):
        return getattr(self._runner, name)

    def save_checkpoint(self, out_dir: str, filename: str, file_client_args: Optional[dict] = None, **kwargs) -> None:
        final = os.path.join(out_dir, filename)
        try:
            self._runner.save_checkpoint(out_dir, filename + PART, file_client_args, **kwargs)
            if is_main_process():
                commit(final + PART, final)
        except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError
            remove(final + PART)
            code = getattr(error, 'errno', None) or 0
            reason = getattr(error, 'strerror', None) or str(error).split('\n')[0]
            raise OSError(
                code, f'checkpoint {final} cannot be written ({reason}); earlier checkpoints are as they were'
            ) from error


def _check(path: str, advice: str) -> None:
    damage = find_damage(path)
    if damage:
        raise CheckpointError(f'checkpoint {path!r} is damaged ({damage}); {advice}')
