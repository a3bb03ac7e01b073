#include <bluefog/tensor.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <initializer_list>
#include <set>

namespace bluefog {
namespace {

using ::testing::HasSubstr;

TensorView View(std::initializer_list<int64_t> shape, std::initializer_list<int64_t> strides,
                DType dtype = DType::kFloat32) {
  TensorView t;
  t.dtype = dtype;
  t.ndim = static_cast<int8_t>(shape.size());
  std::copy(shape.begin(), shape.end(), t.shape.begin());
  std::copy(strides.begin(), strides.end(), t.strides.begin());
  t.count = 1;
  for (const int64_t n : shape) t.count *= n;
  return t;
}

TEST(Tensor, EveryDTypeHasItsOwnNameAndASize) {
  std::set<std::string> names;
  for (int i = 0; i < kDTypeCount; ++i) {
    names.insert(NameOf(static_cast<DType>(i)));
    EXPECT_GT(SizeOf(static_cast<DType>(i)), 0);
  }
  EXPECT_EQ(names.size(), static_cast<size_t>(kDTypeCount));
  EXPECT_STREQ(NameOf(DType::kBFloat16), "bfloat16");
  EXPECT_STREQ(NameOf(static_cast<DType>(77)), "unknown dtype");
}

TEST(Tensor, OfIsAOneDimensionalDenseView) {
  double x[3];
  const TensorView t = TensorView::Of(x, 3);
  EXPECT_EQ(t.data, x);
  EXPECT_EQ(t.bytes(), 24);
  EXPECT_EQ(t.ToString(), "float64[3]");
  EXPECT_TRUE(t.CheckDense().ok());
}

TEST(Tensor, AnyOrderOfTheDimensionsIsDense) {
  EXPECT_TRUE(View({2, 3, 4}, {12, 4, 1}).CheckDense().ok());
  EXPECT_TRUE(View({64, 3, 7, 7}, {147, 1, 21, 3}).CheckDense().ok());  // channels_last
  EXPECT_TRUE(View({5, 7}, {1, 5}).CheckDense().ok());                  // transposed
  EXPECT_TRUE(View({}, {}).CheckDense().ok());                          // 0-dim
}

TEST(Tensor, StridesThatAddressNothingDoNotMatter) {
  EXPECT_TRUE(View({1, 3}, {77, 1}).CheckDense().ok());
  EXPECT_TRUE(View({3, 1}, {1, 0}).CheckDense().ok());
  EXPECT_TRUE(View({1, 1}, {-5, 9}).CheckDense().ok());
  EXPECT_TRUE(View({0, 3}, {100, 50}).CheckDense().ok());
  EXPECT_EQ(View({1, 3}, {77, 1}).ToString(), "float32[1, 3]");
  EXPECT_EQ(View({1, 3}, {77, 1}).LayoutHash(), View({1, 3}, {3, 1}).LayoutHash());
}

TEST(Tensor, GapsOverlapsAndFlipsAreRefusedByName) {
  const std::initializer_list<std::pair<TensorView, const char*>> cases = {
      {View({2, 3}, {8, 1}), "float32[2, 3] strides (8, 1)"},  // slice of columns
      {View({4}, {2}), "float32[4] strides (2)"},              // every second
      {View({3, 3}, {0, 1}), "strides (0, 1)"},                // expanded
      {View({4}, {-1}), "strides (-1)"},                       // flipped
      {View({2, 2}, {1, 1}), "strides (1, 1)"},                // overlapping
  };
  for (const auto& [view, text] : cases) {
    const Status s = view.CheckDense();
    EXPECT_EQ(s.code(), absl::StatusCode::kInvalidArgument) << text;
    EXPECT_THAT(std::string(s.message()), HasSubstr(text));
    EXPECT_THAT(std::string(s.message()), HasSubstr("contiguous copy"));
  }
}

TEST(Tensor, ImpossibleViewsAreRefused) {
  TensorView wrong_count = View({2, 3}, {3, 1});
  wrong_count.count = 7;
  EXPECT_THAT(std::string(wrong_count.CheckDense().message()), HasSubstr("7 elements"));
  TensorView negative = View({-2}, {1});
  EXPECT_FALSE(negative.CheckDense().ok());
  TensorView many_dims = View({2}, {1});
  many_dims.ndim = kMaxDims + 1;
  EXPECT_THAT(std::string(many_dims.CheckDense().message()), HasSubstr("9 dimensions"));
  many_dims.ndim = 100;
  EXPECT_FALSE(many_dims.ToString().empty());
  TensorView huge = View({2, 2, 2}, {1, 1, 1});
  huge.shape = {int64_t{1} << 40, int64_t{1} << 40, 1};
  huge.count = 0;
  EXPECT_FALSE(huge.CheckDense().ok());
  // Beyond 2^31 elements is fine.
  EXPECT_TRUE(View({int64_t{1} << 33, 2}, {2, 1}).CheckDense().ok());
}

TEST(Tensor, LayoutHashTellsShapeDTypeAndMemoryOrderApart) {
  const auto base = View({4, 6}, {6, 1}).LayoutHash();
  EXPECT_NE(base, 0u);
  EXPECT_EQ(base, View({4, 6}, {6, 1}).LayoutHash());
  EXPECT_NE(base, View({6, 4}, {4, 1}).LayoutHash());
  EXPECT_NE(base, View({24}, {1}).LayoutHash());
  EXPECT_NE(base, View({4, 6}, {1, 4}).LayoutHash());
  EXPECT_NE(base, View({4, 6}, {6, 1}, DType::kInt32).LayoutHash());
  EXPECT_NE(View({}, {}).LayoutHash(), View({1}, {1}).LayoutHash());
  EXPECT_NE(View({0, 3}, {3, 1}).LayoutHash(), View({3, 0}, {1, 1}).LayoutHash());
}

TEST(Tensor, ToStringShowsStridesOnlyWhereTheyTellSomething) {
  EXPECT_EQ(View({64, 3, 7, 7}, {147, 49, 7, 1}).ToString(), "float32[64, 3, 7, 7]");
  EXPECT_EQ(View({64, 3, 7, 7}, {147, 1, 21, 3}).ToString(),
            "float32[64, 3, 7, 7] strides (147, 1, 21, 3)");
  EXPECT_EQ(View({}, {}, DType::kBool).ToString(), "bool[]");
}

}  // namespace
}  // namespace bluefog
