// Small kernels for the tests of the driver API (emulator/tests/it), each with parameters that a
// test inspects. The emu_bug_ kernels are wrong on purpose.
#include "kernel.cuh"

// y[n] = factor * x[n]
extern "C" __global__ void __launch_bounds__(256)
    emu_ok_scale(float* y, const float* x, const float factor, const int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = factor * x[i];
}
EXPORT_KERNEL(emu_ok_scale, 256)

// log[0] counts the entries that follow it. One thread; two launches at once are an error.
extern "C" __global__ void __launch_bounds__(32) emu_ok_append(int* log, const int value) {
  int count = log[0];
  log[1 + count] = value;
  log[0] = count + 1;
}
EXPORT_KERNEL(emu_ok_append, 32)

struct MixedArgs {
  int a;
  double b;
  char c;
};

// Parameters with padding between them: out[4] = {a, b, c, args.a + args.b + args.c}
extern "C" __global__ void __launch_bounds__(32)
    emu_ok_mixed(double* out, const signed char a, const double b, const short c,
                 const MixedArgs args) {
  out[0] = a;
  out[1] = b;
  out[2] = c;
  out[3] = args.a + args.b + args.c;
}
EXPORT_KERNEL(emu_ok_mixed, 32)

extern "C" __global__ void __launch_bounds__(1024) emu_ok_nothing() {}
EXPORT_KERNEL(emu_ok_nothing, 1024)

// Touches the first and the last byte of `bytes` of dynamic shared memory: out[0] = 42
extern "C" __global__ void __launch_bounds__(64) emu_ok_shared(int* out, const int bytes) {
  SHARED_DYNAMIC(memory);
  if (threadIdx.x == 0) {
    memory[0] = 40;
    memory[bytes - 1] = 2;
    out[0] = bytes == 1 ? 42 : memory[0] + memory[bytes - 1];
  }
}
EXPORT_KERNEL(emu_ok_shared, 64)

// p[index] = value, in or out of bounds.
extern "C" __global__ void __launch_bounds__(32)
    emu_bug_write_at(int* p, const long long index, const int value) {
  p[index] = value;
}
EXPORT_KERNEL(emu_bug_write_at, 32)

struct WriteAtParams {
  long long index;
  int* p;
  int value;
  int padding;
};

// The same with one struct for all parameters.
extern "C" __global__ void __launch_bounds__(32)
    emu_bug_write_at_of_struct(const WriteAtParams params) {
  params.p[params.index] = params.value;
}
EXPORT_KERNEL(emu_bug_write_at_of_struct, 32)
