// Codecs that the engine brings, and the memory that encoded messages take.
#pragma once

#include <cstdint>

#include <bluefog/optimizer.h>

namespace bluefog {

/// Elements rounded to `message` (kernels::Narrow); null if that is the tensor's own type, and
/// InvalidArgument if it has not fewer bits.
StatusOr<const Codec*> MessageCodec(DType dtype, DType message);

/// Encoded messages of at most `chunk` elements lie one after the other, so many bytes apart for
/// each element, and take so much in all for `count` elements.
int64_t CodedStride(const Codec& codec, DType dtype, int64_t chunk);
int64_t CodedBytes(const Codec& codec, DType dtype, int64_t count, int64_t chunk);

}  // namespace bluefog
