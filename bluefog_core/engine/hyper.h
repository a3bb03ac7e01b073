// A group's hyper-parameters by name: checked, compared and written out alike.
#pragma once

#include <cstdint>
#include <string>

#include <bluefog/optimizer.h>

namespace bluefog {

/// "lr 0.1, momentum 0.9, weight_decay 0", or without the learning rate.
std::string ToString(const Traits& traits, const Hyper& hyper, bool learning_rate = true);
/// Of all but the learning rate, which messages carry as a number.
uint64_t HashOfRest(const Traits& traits, const Hyper& hyper);
/// InvalidArgument names the value that is not finite or outside its limits.
Status CheckHyper(const Traits& traits, const Hyper& hyper);

}  // namespace bluefog
