#include "engine/codec.h"

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include <bluefog/elementwise.h>

#include "kernels/kernels.h"

namespace bluefog {
namespace {

class NarrowCodec final : public Codec {
 public:
  explicit NarrowCodec(DType message) : message_(message) {}
  const char* name() const override { return NameOf(message_); }
  int64_t MaxBytes(DType, int64_t n) const override { return n * ElementBytes(); }
  int64_t ElementBytes() const override { return SizeOf(message_); }
  int64_t Encode(DType dtype, int64_t n, const void* x, std::byte* out) const override {
    kernels::Narrow(dtype, message_, n, x, out);
    return n * ElementBytes();
  }
  Status DecodeAdd(DType dtype, int64_t n, std::span<const std::byte> bytes, double weight,
                   void* acc) const override {
    const kernels::Term term{bytes.data(), weight};
    kernels::MixNarrow(dtype, message_, n, acc, 1.0, acc, nullptr, {&term, 1});
    return absl::OkStatus();
  }
  Status Mix(DType dtype, int64_t n, void* out, double total, const void* x,
             std::span<const std::byte> own, std::span<const Message> messages) const override {
    // Calls are made one at a time on a thread; its memory is used again.
    thread_local std::vector<kernels::Term> terms;
    terms.clear();
    for (const Message& m : messages) terms.push_back({m.bytes.data(), m.weight});
    kernels::MixNarrow(dtype, message_, n, out, total, x, own.data(), terms);
    return absl::OkStatus();
  }

 private:
  const DType message_;
};

}  // namespace

Status Codec::Mix(DType dtype, int64_t n, void* out, double total, const void* x,
                  std::span<const std::byte> own, std::span<const Message> messages) const {
  if (Status s = elementwise::CheckDType(dtype); !s.ok()) return s;
  elementwise::Scale(dtype, n, out, total, x);
  double given = 0.0;
  for (const Message& m : messages) {
    given += m.weight;
    if (Status s = DecodeAdd(dtype, n, m.bytes, m.weight, out); !s.ok()) {
      return Status(s.code(),
                    "message of rank " + std::to_string(m.rank) + ": " + std::string(s.message()));
    }
  }
  return DecodeAdd(dtype, n, own, -given, out);
}

StatusOr<const Codec*> MessageCodec(DType dtype, DType message) {
  static const std::array<NarrowCodec, 3> kCodecs = {
      NarrowCodec(DType::kFloat16), NarrowCodec(DType::kBFloat16), NarrowCodec(DType::kFloat32)};
  if (message == dtype) return nullptr;
  if (!kernels::CanNarrow(dtype, message)) {
    return absl::InvalidArgumentError(
        std::string(NameOf(dtype)) + " cannot travel as " + NameOf(message) +
        ": message_dtype is float16 or bfloat16 for float32 tensors, these or float32 for float64 "
        "ones");
  }
  for (const NarrowCodec& codec : kCodecs) {
    if (codec.name() == std::string(NameOf(message))) return &codec;
  }
  return absl::InternalError("no codec");
}

int64_t CodedStride(const Codec& codec, DType dtype, int64_t chunk) {
  return (codec.MaxBytes(dtype, chunk) + chunk - 1) / chunk;
}

int64_t CodedBytes(const Codec& codec, DType dtype, int64_t count, int64_t chunk) {
  const int64_t stride = CodedStride(codec, dtype, chunk), last = count % chunk;
  return stride * (count - last) + std::max(stride * last, codec.MaxBytes(dtype, last));
}

}  // namespace bluefog
