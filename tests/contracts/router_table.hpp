// SPDX-License-Identifier: Apache-2.0
// The contract suite over a list of routers, in both precisions.
#pragma once

#include "contracts/router_contract.hpp"

namespace test {

/// `make(T{})` gives one router of compute type T.
template <class Make>
void keep_the_contract(const char* what, Make make) {
  INFO(what);
  router_contract(make(float{}));
  router_contract(make(double{}));
}

template <class Make>
void keep_the_threads_contract(const char* what, Make make) {
  INFO(what);
  router_threads_contract(make(float{}));
  router_threads_contract(make(double{}));
}

}  // namespace test

/// A row of a table: a router template, its config.
#define ROUTER_ROW(Template, ...) \
#Template " " #__VA_ARGS__, [] < class T>(T) { return mole::Template<T>({__VA_ARGS__}); }
