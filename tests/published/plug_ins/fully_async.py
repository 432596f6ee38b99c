"""Generation that never stops, as such plug-ins are written: a worker thread with an event loop of its own."""

import asyncio
import atexit
import queue
import threading
import time

from miles.rollout.sglang_rollout import GenerateState, generate_and_rm_group
from miles.utils.async_utils import run
from miles.utils.types import Sample

_global_worker = None
_worker_lock = threading.Lock()


def get_global_worker(args, data_buffer):
    global _global_worker
    with _worker_lock:
        if _global_worker is None or not _global_worker.worker_thread.is_alive():
            _global_worker = AsyncRolloutWorker(args, data_buffer, concurrency=args.sglang_server_concurrency)
            _global_worker.start()
        return _global_worker


def stop_global_worker():
    global _global_worker
    with _worker_lock:
        if _global_worker is not None:
            _global_worker.stop()
            _global_worker = None


class AsyncRolloutWorker:
    def __init__(self, args, data_buffer, concurrency=10):
        self.args = args
        self.data_buffer = data_buffer
        self.concurrency = concurrency
        self.running = True
        self.output_queue = queue.Queue(maxsize=1000)
        self.worker_thread = None
        self.errors = []
        self.state = GenerateState(args)

    async def continuous_worker_loop(self):
        active_tasks = set()
        max_concurrent_tasks = self.args.rollout_batch_size
        group_id_counter = 0
        while self.running:
            done_tasks = {task for task in active_tasks if task.done()}
            for task in done_tasks:
                if task.exception() is not None:
                    self.errors.append(task.exception())
            active_tasks -= done_tasks

            while len(active_tasks) < max_concurrent_tasks and self.running:
                for group in self.data_buffer.get_samples(1):
                    group_id = group_id_counter
                    group_id_counter += 1
                    task = asyncio.create_task(
                        generate_and_rm_group(
                            self.args, group, sampling_params=self.state.sampling_params.copy(), evaluation=False
                        )
                    )

                    def callback(done_task, gid=group_id):
                        if done_task.exception() is None:
                            self.output_queue.put((gid, done_task.result()))

                    task.add_done_callback(callback)
                    active_tasks.add(task)
                    break
            await asyncio.sleep(0.001)
        if active_tasks:
            await asyncio.wait(active_tasks)

    def worker_thread_func(self):
        asyncio.run(self.continuous_worker_loop())

    def start(self):
        if self.worker_thread is None or not self.worker_thread.is_alive():
            self.worker_thread = threading.Thread(target=self.worker_thread_func, daemon=True)
            self.worker_thread.start()

    def stop(self):
        self.running = False
        if self.worker_thread and self.worker_thread.is_alive():
            self.worker_thread.join(timeout=5)

    def get_completed_groups(self):
        completed = []
        while True:
            try:
                completed.append(self.output_queue.get_nowait())
            except queue.Empty:
                return completed


async def generate_rollout_async(args, rollout_id: int, data_buffer) -> list[list[Sample]]:
    assert args.rollout_global_dataset
    worker = get_global_worker(args, data_buffer)
    target_data_size = args.rollout_batch_size
    data, start_time = [], time.time()
    while len(data) < target_data_size:
        if worker.errors:
            raise worker.errors[0]
        for _, group in worker.get_completed_groups():
            if any(sample.status == Sample.Status.ABORTED for sample in group):
                data_buffer.add_samples([group])
                continue
            if len(data) < target_data_size:
                data.append(group)
        assert time.time() - start_time < 60, "nothing finished"
        await asyncio.sleep(0.01)
    return sorted(data, key=lambda group: group[0].index)


def generate_rollout_fully_async(args, rollout_id, data_buffer, evaluation=False):
    if evaluation:
        raise ValueError("Evaluation mode not supported in simple async rollout")
    return run(generate_rollout_async(args, rollout_id, data_buffer))


atexit.register(stop_global_worker)
