// A stand-in for cuBLAS on the CPU, for test_peers.py: cublasGemmGroupedBatchedEx after the manual,
// for groups of one matrix in f32 or bf16, with sums in double. All matrices are column-major, as
// in cuBLAS.

#include <cstdint>
#include <cstring>

namespace {

constexpr int kSuccess = 0, kInvalidValue = 7;
constexpr int kOpN = 0, kF32 = 0, kBf16 = 14, kCompute32F = 68;

float load(const void* matrix, int type, int64_t index) {
  if (type == kF32) return static_cast<const float*>(matrix)[index];
  uint32_t bits = uint32_t{static_cast<const uint16_t*>(matrix)[index]} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

void store(void* matrix, int type, int64_t index, float value) {
  if (type == kF32) {
    static_cast<float*>(matrix)[index] = value;
    return;
  }
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits += 0x7fff + (bits >> 16 & 1);  // Rounds to nearest, ties to even.
  static_cast<uint16_t*>(matrix)[index] = static_cast<uint16_t>(bits >> 16);
}

}  // namespace

extern "C" {

int cublasCreate_v2(void** handle) {
  *handle = handle;
  return kSuccess;
}

int cublasSetStream_v2(void*, void*) { return kSuccess; }

int cublasGetVersion_v2(void*, int* version) {
  *version = 130100;
  return kSuccess;
}

int cublasGemmGroupedBatchedEx(void*, const int* transa, const int* transb, const int* m,
                               const int* n, const int* k, const void* alpha, const void* const* a,
                               int a_type, const int* lda, const void* const* b, int b_type,
                               const int* ldb, const void* beta, void* const* c, int c_type,
                               const int* ldc, int group_count, const int* group_size,
                               int compute) {
  if (compute != kCompute32F || a_type != b_type || a_type != c_type) return kInvalidValue;
  if (a_type != kF32 && a_type != kBf16) return kInvalidValue;
  for (int group = 0; group < group_count; ++group) {
    bool a_plain = transa[group] == kOpN, b_plain = transb[group] == kOpN;
    if (group_size[group] != 1 || ldc[group] < m[group]) return kInvalidValue;
    if (lda[group] < (a_plain ? m : k)[group] || ldb[group] < (b_plain ? k : n)[group])
      return kInvalidValue;
    float by = static_cast<const float*>(alpha)[group],
          old = static_cast<const float*>(beta)[group];
    for (int64_t i = 0; i < m[group]; ++i) {
      for (int64_t j = 0; j < n[group]; ++j) {
        double sum = 0;
        for (int64_t p = 0; p < k[group]; ++p) {
          int64_t a_at = a_plain ? i + p * lda[group] : p + i * lda[group];
          int64_t b_at = b_plain ? p + j * ldb[group] : j + p * ldb[group];
          sum += double{load(a[group], a_type, a_at)} * load(b[group], b_type, b_at);
        }
        int64_t at = i + j * ldc[group];
        double before = old == 0 ? 0 : double{old} * load(c[group], c_type, at);
        store(c[group], c_type, at, static_cast<float>(by * sum + before));
      }
    }
  }
  return kSuccess;
}

}  // extern "C"
