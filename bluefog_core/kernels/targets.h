// The instruction sets we compile for, chosen before Highway is included. On x86-64: AVX-512, AVX2
// (with FMA and F16C), and a scalar fallback. SSE4 and SSSE3 have no fused multiply-add: every
// product would go through std::fma lane by lane, as in the fallback, so they would only add code.
// Scalable vectors (SVE, RVV) are left out because a fixed order of summation needs lane counts
// known to the compiler.
#pragma once

#ifdef HWY_DISABLED_TARGETS
#error "include kernels/targets.h before any Highway header"
#endif
#define HWY_DISABLED_TARGETS \
  (HWY_SSE4 | HWY_SSSE3 | HWY_AVX3_DL | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)
