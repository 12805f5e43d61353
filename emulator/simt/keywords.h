// The keywords of CUDA C++ that have no effect on the host, and the one that is forbidden.
#pragma once

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __cluster_dims__(...)
#define __align__(n) __attribute__((aligned(n)))

// One instance of a __shared__ variable per block needs compiler support, so kernels use
// SHARED_ARRAY.
#define __shared__ use_SHARED_ARRAY_or_SHARED_DYNAMIC_instead_of___shared__
