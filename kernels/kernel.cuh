// The one include of every kernel file, and the only place that asks which compiler is at work.
// nvcc gets the toolkit's headers and ptx.cuh; g++ gets their twins from the software device.
#pragma once

#ifdef __CUDACC__

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

// 1 where code for Hopper's portable instructions (clusters, mbarriers, TMA) may be compiled, and
// where code for those of sm_90a alone (wgmma, setmaxnreg) may be. The host pass only parses both.
#if !defined(__CUDA_ARCH__)
#define KERNEL_SM90 1
#define KERNEL_SM90A 1
#else
#define KERNEL_SM90 (__CUDA_ARCH__ >= 900)
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define KERNEL_SM90A 1
#else
#define KERNEL_SM90A 0
#endif
#endif

// The launch's dynamic shared memory as `unsigned char*`. 1024 is what the widest swizzle needs.
#define SHARED_DYNAMIC(name) extern __shared__ __align__(1024) unsigned char name[]

// A static array in shared memory.
#define SHARED_ARRAY(T, name, n) __shared__ T name[n]

// Makes an entry known to the software device. nvcc exports extern "C" entries by itself, so all
// that remains here is a check that the symbol exists and that the bound is a block size.
#define EXPORT_KERNEL(symbol, max_threads)                           \
  static_assert(sizeof(&symbol) != 0, "the entry must be declared"); \
  static_assert((max_threads) >= 1 && (max_threads) <= 1024, "a block size");

#include "ptx.cuh"

#else

#define KERNEL_SM90 1
#define KERNEL_SM90A 1

#include "simt.h"
#include "simt_ptx.h"

#endif

#include "abi.h"
#include "common.cuh"
#include "exact.cuh"
#include "select.cuh"
#include "team.cuh"
#include "router.cuh"
#include "activation.cuh"
#include "gemm_tile.cuh"
#include "gemm_epilogue.cuh"
