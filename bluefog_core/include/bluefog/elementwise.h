// Element-wise arithmetic for optimizer plugins, dispatched at run time to the best instruction set
// and bit-equal on all of them. `n` elements of `dtype` (kFloat32 or kFloat64); scalars are rounded
// to the element type first. out may be the same pointer as an input; partial overlap is not
// allowed. Other types (CheckDType) are left untouched by all but Copy.
#pragma once

#include <cstdint>

#include <bluefog/tensor.h>

namespace bluefog::elementwise {

/// Ok for the types above; else InvalidArgument that names the type.
Status CheckDType(DType dtype);

/// out = x; any type.
void Copy(DType dtype, int64_t n, void* out, const void* x);
/// out = value
void Fill(DType dtype, int64_t n, void* out, double value);
/// out = fma(a, x, y): one rounding.
void MulAdd(DType dtype, int64_t n, void* out, double a, const void* x, const void* y);
/// out = round(a*x) + y: two roundings, as mul_().add_() in PyTorch.
void ScaleAdd(DType dtype, int64_t n, void* out, double a, const void* x, const void* y);
/// out = a*x
void Scale(DType dtype, int64_t n, void* out, double a, const void* x);
/// out = x + y
void Add(DType dtype, int64_t n, void* out, const void* x, const void* y);
/// out = x - y
void Sub(DType dtype, int64_t n, void* out, const void* x, const void* y);
/// v = fma(beta, v, x - target), then x = x - v: one heavy-ball step of x towards `target`, in one
/// pass. x, v and target are three different arrays.
void HeavyBall(DType dtype, int64_t n, void* x, void* v, double beta, const void* target);
/// Sum of squares in fp64, in an order fixed by n alone.
double SumOfSquares(DType dtype, int64_t n, const void* x);
/// How many elements are NaN or infinite.
int64_t CountNonFinite(DType dtype, int64_t n, const void* x);

}  // namespace bluefog::elementwise
