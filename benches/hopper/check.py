"""Checks and times packed.cu on a Hopper GPU, beside torch's bf16 product. Needs nvcc (NVCC, or the one in PATH) and torch.

    python3 benches/hopper/check.py           # about 20 s
    python3 benches/hopper/check.py compile   # no GPU: registers and spills of every variant, into a folder kept for later
    python3 benches/hopper/check.py FOLDER    # runs what is in that folder

Errors are relative, the worst row's, against f64. What a kernel that takes its place must beat, at 4096 x 2048 x 8192: 370 us
for cast, unpacking and hopper.cu together; the goal is 1.25 times torch's time. The cast to f16 isn't in these times.
"""
import ctypes, os, pathlib, subprocess, sys, tempfile
from concurrent.futures import ThreadPoolExecutor

HERE = pathlib.Path(__file__).parent
NO_OFFSETS = 8  # the code of zero on a symmetric grid of 4 bits
VARIANTS = {  # name: definitions that differ, and whether results are right
    "plain": {},
    "stages4": dict(STAGES=4),
    "band16": dict(BAND=16),
    "oneblock": dict(BLOCKS=1),
    "bits2": dict(BITS=2),
    "bits3": dict(BITS=3),
    "bits8": dict(BITS=8),
    "symmetric": dict(OFFSETS=0, LEAST="0xE408E408u"),
    "update": dict(UPDATE=1),
    "nounpack": dict(NOUNPACK=1),
    "nostore": dict(NOSTORE=1),
    "neither": dict(NOUNPACK=1, NOSTORE=1),
}
WRONG = {"nounpack", "nostore", "neither"}


def source(transposed, **changed):
    defined = dict(BITS=4, TRANSPOSED=transposed, OFFSETS=1, LEAST="0xE400E400u", UPDATE=0, STAGES=5, BLOCKS=2, BAND=8)
    defined |= dict(NOUNPACK=0, NOSTORE=0) | changed
    lines = [f"#define {name} {value}" for name, value in defined.items()]
    sums = ", ".join(f"%{i}" for i in range(64))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(64))
    for name, operand in [("MULTIPLY", "f16"), ("MULTIPLY_UPDATE", "bf16")]:
        lines.append(
            f'#define {name}(d, a, b) asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.{operand}.{operand} '
            f'{{{sums}}}, {{%64, %65, %66, %67}}, %68, 1, 1, 1, 0;" : {outputs} '
            ': "r"((a)[0]), "r"((a)[1]), "r"((a)[2]), "r"((a)[3]), "l"(b))'
        )
    return "\n".join(lines) + "\n" + (HERE / "packed.cu").read_text()


def build(folder):
    nvcc = os.environ.get("NVCC", "nvcc")

    def one(job):
        name, text = job
        path = folder / f"{name}.cu"
        path.write_text(text)
        command = [nvcc, "-gencode=arch=compute_90a,code=sm_90a", "-std=c++17", "-cubin", "-Xptxas", "-v"]
        done = subprocess.run(command + [path, "-o", path.with_suffix(".cubin")], capture_output=True, text=True)
        said = [line for line in done.stderr.splitlines() if any(w in line for w in ("error", "Used", "serialized"))]
        spills = "0 bytes spill stores" not in done.stderr
        return f"{name:20} {' '.join(said)}{' SPILLS' if spills else ''}"

    jobs = [(f"{d}_{name}", source(t, **v)) for t, d in enumerate("fb") for name, v in VARIANTS.items()]
    with ThreadPoolExecutor() as pool:
        for line in pool.map(one, jobs):
            print(line)


def order(transposed):
    """The place in a run of 32 that each of a fragment's places takes its value from."""
    found = []
    for place in range(32):
        pair = place // 16 * 2 + place % 16 // 8
        thread, one = place % 8 // 2, place % 2
        found.append(8 * thread + (2 * pair + one if transposed else pair + 4 * one))
    return found


class Map(ctypes.Structure):
    _fields_ = [("words", ctypes.c_uint64 * 16)]


class Device:
    def __init__(self, folder):
        import torch

        self.torch, self.folder, self.driver = torch, folder, ctypes.CDLL("libcuda.so.1")
        torch.zeros(1, device="cuda")

    def call(self, name, *arguments):
        status = getattr(self.driver, name)(*arguments)
        if status:
            raise RuntimeError(f"{name}: {status}")

    def function(self, name):
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), (self.folder / f"{name}.cubin").read_bytes())
        self.call("cuModuleGetFunction", ctypes.byref(function), module, b"product")
        return function

    def map(self, x):
        raw = ctypes.create_string_buffer(128 + 64)
        found = Map.from_address((ctypes.addressof(raw) + 63) // 64 * 64)
        found.kept = raw
        (rows, k), size = x.shape, x.element_size()
        kind = 6 if x.dtype == self.torch.float16 else 9
        sizes, strides = (ctypes.c_uint64 * 3)(k, rows, 1), (ctypes.c_uint64 * 2)(k * size, rows * k * size)
        box, steps = (ctypes.c_uint32 * 3)(32, 64, 1), (ctypes.c_uint32 * 3)(1, 1, 1)
        address = ctypes.c_void_p(x.data_ptr())
        # No interleaving, rows of 64 bytes swizzled, promoted to 128 bytes in the cache, zeros outside.
        self.call("cuTensorMapEncodeTiled", ctypes.byref(found), kind, 3, address, sizes, strides, box, steps, 0, 2, 2, 0)
        return found

    def median(self, launch, outs):
        torch, times = self.torch, []
        for _ in range(3):
            launch(outs[0])
        for _ in range(20):
            start, end = torch.cuda.Event(True), torch.cuda.Event(True)
            start.record(), launch(outs[0]), launch(outs[1]), end.record()
            times.append((start, end))
        torch.cuda.synchronize()
        return sorted(start.elapsed_time(end) for start, end in times)[10] / 2 * 1e3

    def words(self, codes, bits):
        torch, (d_input, d_output) = self.torch, codes.shape
        runs = codes.view(d_input // 32, 32, d_output).cpu()
        words = torch.zeros(d_input // 32, bits, d_output, dtype=torch.int64)
        for i in range(32):
            word, shift = divmod(bits * i, 32)
            words[:, word] |= runs[:, i] << shift & 0xFFFFFFFF
            if shift + bits > 32:
                words[:, word + 1] |= runs[:, i] >> 32 - shift
        return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).view(-1, d_output).cuda().contiguous()

    def check(self, direction, variant, m, d_input, d_output, block=64, timed=True):
        torch, changed = self.torch, VARIANTS[variant]
        bits, offsets, update = changed.get("BITS", 4), changed.get("OFFSETS", 1), changed.get("UPDATE", 0)
        transposed, draw = direction == "b", torch.Generator(device="cuda").manual_seed(1)
        random = lambda *sizes: torch.randn(*sizes, generator=draw, device="cuda")
        codes = torch.randint(0, 2**bits, (d_input, d_output), generator=draw, device="cuda")
        groups = -(-d_input // block)
        scales = (random(groups, d_output).abs() * 0.01 + 0.005).half()
        shifts = (-(2**bits) * 0.005 * random(groups, d_output).abs()).half() * offsets
        spread = lambda x: x.float().repeat_interleave(block, 0)[:d_input]
        dense = ((codes - (0 if offsets else NO_OFFSETS)).float() * spread(scales) + spread(shifts)).half()
        words = self.words(codes, bits)
        weight = dense.T if transposed else dense
        n, k = (d_input, d_output) if transposed else (d_output, d_input)
        # Rows of very different sizes, whose numbers f16 holds exactly once they are scaled.
        x = random(m, k).half().float() * torch.exp2(torch.randint(-30, 30, (m, 1), generator=draw, device="cuda"))
        factor = torch.exp2(-torch.floor(torch.log2(x.abs().amax(1))))[:, None]
        padded = torch.zeros(m, -(-k // 32) * 32, dtype=torch.float16, device="cuda")
        padded[:, :k] = (x * factor).half()
        ordered = padded.view(m, -1, 32)[:, :, order(transposed)].contiguous().view(m, -1)
        left, right = (random(m, 48) / factor).bfloat16(), random(48, n).bfloat16()
        scaled, undone = (left.float() * factor).bfloat16(), (1 / factor[:, 0]).contiguous()
        maps = [self.map(ordered)] + [self.map(scaled)] * update
        sizes = (ctypes.c_uint64 * 6)(m, n, k, 48 * update, block, d_output)
        function, tiles = self.function(f"{direction}_{variant}"), -(-m // 128) * -(-n // 128)

        def launch(out):
            tensors = [words, scales] + [shifts] * offsets + [right] * update + [undone, out]
            held = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
            addresses = [ctypes.addressof(argument) for argument in [*maps, *held, sizes]]
            arguments = (ctypes.c_void_p * len(addresses))(*addresses)
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            self.call("cuLaunchKernel", function, tiles, 1, 1, 128, 1, 1, 0, stream, arguments, None)

        outs = [torch.full((m, n), float("nan"), device="cuda") for _ in range(2)]
        launch(outs[0])
        torch.cuda.synchronize()
        rows = torch.randint(0, m, (64,), generator=draw, device="cuda")
        expected = x[rows].double() @ weight.double()
        if update:
            expected += left[rows].double() @ right.double()
        error = ((outs[0][rows] - expected).norm(dim=1) / expected.norm(dim=1)).max().item()
        line = f"{direction}_{variant:12} {m}x{k}x{n} of {bits} bits in groups of {block}"
        if variant not in WRONG:
            line += f", error {error:.1e}, missing {outs[0].isnan().sum().item()}"
            line += "" if error < 1e-4 else "  WRONG"
        if timed:
            micros = self.median(launch, outs)
            line += f", {micros:.1f} us, {2e-6 * m * n * k / micros:.0f} TFLOP/s"
        print(line, flush=True)

    def torchs(self, m, k, n):
        torch = self.torch
        x, w = torch.randn(m, k, device="cuda").bfloat16(), torch.randn(k, n, device="cuda").bfloat16()
        outs = [torch.empty(m, n, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        micros = self.median(lambda out: torch.matmul(x, w, out=out), outs)
        print(f"torch {m}x{k}x{n}, {micros:.1f} us, {2e-6 * m * n * k / micros:.0f} TFLOP/s", flush=True)


def run(folder):
    device = Device(folder)
    for sizes in [(4096, 2048, 8192), (4096, 8192, 2048), (4096, 2048, 2048)]:
        device.torchs(*sizes)
    for direction in "fb":
        for variant in VARIANTS:
            device.check(direction, variant, 4096, 2048, 8192)
        device.check(direction, "plain", 4096, 2048, 2048)
        for variant in ["plain", "symmetric", "update", "bits2", "bits3", "bits8"]:
            device.check(direction, variant, 300, 224, 136, block=32, timed=False)
            device.check(direction, variant, 77, 96, 200, block=96, timed=False)


if __name__ == "__main__":
    asked = sys.argv[1] if len(sys.argv) > 1 else None
    if asked and asked != "compile":
        run(pathlib.Path(asked))
    else:
        folder = pathlib.Path(tempfile.mkdtemp(prefix="packed-"))
        build(folder)
        print(folder) if asked else run(folder)
