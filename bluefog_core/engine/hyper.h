// A group's hyper-parameters by name: checked, compared and written out alike.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include <bluefog/optimizer.h>

namespace bluefog {

/// lr, momentum, weight_decay, then the plugin's own.
size_t HyperCount(const Traits& traits);
std::pair<const HyperInfo&, double> HyperAt(const Traits& traits, const Hyper& hyper, size_t i);

/// "lr 0.1, momentum 0.9, weight_decay 0", or without the learning rate.
std::string ToString(const Traits& traits, const Hyper& hyper, bool learning_rate = true);
/// Of all but the learning rate, which messages carry as a number.
uint64_t HashOfRest(const Traits& traits, const Hyper& hyper);
/// InvalidArgument names the value that is not finite or outside its limits.
Status CheckHyper(const Traits& traits, const Hyper& hyper);

}  // namespace bluefog
