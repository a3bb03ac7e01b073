// The weighted sum, the one memory pass of every collective, and rounded messages. Run-time SIMD
// dispatch (Highway), explicit FMA, bit-equal on every instruction set dispatched to. Element-wise
// kernels for plugins are public, in <bluefog/elementwise.h>.
#pragma once

#include <cstdint>
#include <span>

#include <bluefog/tensor.h>

namespace bluefog::kernels {

/// One addend: pointer to at least n elements, and its weight.
struct Term {
  const void* data = nullptr;
  double weight = 1.0;
};

/// out = terms[0].weight*terms[0] + terms[1].weight*terms[1] + …: the first product is rounded,
/// each further term is one FMA, in list order. Weights are rounded to the accumulator's type
/// (fp32; fp64 for fp64). fp16 and bf16 accumulate in fp32 with one rounding at the end. No terms:
/// zeros. `out` may be the same pointer as any term. `streaming`: write past the caches (the output
/// is not read soon). InvalidArgument names a dtype that has no kernel.
Status WeightedSum(DType dtype, int64_t n, void* out, std::span<const Term> terms,
                   bool streaming = false);
/// out = (terms[0] + terms[1] + …) / divisor: a plain sum in list order, then one division; weights
/// are not looked at. divisor 1 leaves the sum alone (integers: only divisor 1).
Status SumDivide(DType dtype, int64_t n, void* out, std::span<const Term> terms, double divisor,
                 bool streaming = false);

/// Can tensors of `dtype` travel as `message`? fp32 and fp64 as fp16 or bf16, fp64 as fp32.
bool CanNarrow(DType dtype, DType message);
/// out = x rounded to `message`: to nearest, ties to even, once also from fp64. Finite values
/// beyond the largest of `message` (65504 of fp16) become that; infinities and NaN stay what they
/// are.
void Narrow(DType dtype, DType message, int64_t n, const void* x, void* out);
/// out = total*x + terms[0].weight*(terms[0] - own) + …, where own and the terms are of type
/// `message` and all else of `dtype`, in which the sum is made: differences first, then one FMA for
/// each term in list order. `out` may be x; own null means zeros. With terms that equal own and
/// total 1, out is x.
void MixNarrow(DType dtype, DType message, int64_t n, void* out, double total, const void* x,
               const void* own, std::span<const Term> terms);

/// The instruction set in use, as Highway names it ("AVX3_ZEN4", "AVX2", "SSE4", …).
const char* ActiveTarget();
/// All instruction sets this build can dispatch to on this machine, best first.
std::span<const char* const> SupportedTargets();
/// For tests: use only this one from now on; false if unknown. Null returns to the best.
bool ForceTarget(const char* name);

}  // namespace bluefog::kernels
