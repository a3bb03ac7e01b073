// A binomial tree on ranks counted from the root: the parent of v is v without its lowest bit. Each
// chunk is forwarded as soon as it is there, the largest subtree first.
#include "collective/builder.h"

namespace bluefog::collective {

Schedule PlanBroadcast(const PlanInput& in, int root) {
  Builder plan(in.count, in.count);
  const int virtual_rank = (in.rank - root + in.size) % in.size;
  auto real = [&](int v) { return (v + root) % in.size; };

  int subtree = 1;  // The power of two that my subtree fits in.
  while (subtree < in.size && (virtual_rank & subtree) == 0) subtree *= 2;
  std::vector<int> children;
  for (int bit = subtree / 2; bit > 0; bit /= 2) {
    if (virtual_rank + bit < in.size) children.push_back(real(virtual_rank + bit));
  }

  int32_t message = 0;
  for (Piece piece : Cut(0, in.count, in.chunk)) {
    const Range output = At(Role::kOutput, piece);
    std::vector<Target> targets;
    for (int child : children) targets.push_back({child, message});
    if (virtual_rank == 0) {
      const Range input = At(Role::kInput, piece);
      if (!targets.empty()) plan.Publish(input, std::move(targets));
      if (!in.in_place) plan.Copy(output, Local(input));
    } else {
      const int parent = real(virtual_rank & (virtual_rank - 1));
      const int32_t copy = plan.Copy(output, View(plan.Receive(parent, message, piece.count)));
      if (!targets.empty()) plan.Publish(output, std::move(targets), {copy});
    }
    ++message;
  }
  return std::move(plan).Finish();
}

}  // namespace bluefog::collective
