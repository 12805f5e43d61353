// CUDA C++ for the host compiler: with this header a kernel file is C++17 source whose threads are
// fibers. kernel.cuh includes it instead of the toolkit's headers.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "types.h"

#include "keywords.h"
#include "thread.h"

#include "arithmetic.h"
#include "atomics.h"
#include "export.h"
#include "warp.h"
