// SPDX-License-Identifier: Apache-2.0
#include "mole/core/error.hpp"

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

#include "support/catch.hpp"

using mole::Errc;

namespace {

template <class F>
mole::Error caught(F&& f) {
  try {
    f();
  } catch (const mole::Error& error) {
    return error;
  }
  throw std::logic_error("nothing was thrown");
}

/// Turns itself into text, and counts how often.
struct Costly {
  int& uses;
  operator std::string_view() const {  // NOLINT(google-explicit-constructor)
    ++uses;
    return "costly";
  }
};

}  // namespace

TEST_CASE("the numbers of the error categories do not change") {
  struct Case {
    Errc code;
    int number;
    std::string_view name;
  };
  const Case cases[] = {
      {Errc::invalid_argument, 1, "invalid_argument"},
      {Errc::shape_mismatch, 2, "shape_mismatch"},
      {Errc::format_error, 3, "format_error"},
      {Errc::limit_exceeded, 4, "limit_exceeded"},
      {Errc::config_error, 5, "config_error"},
      {Errc::unsupported, 6, "unsupported"},
      {Errc::not_found, 7, "not_found"},
      {Errc::io_error, 8, "io_error"},
      {Errc::numeric_error, 9, "numeric_error"},
      {Errc::out_of_memory, 10, "out_of_memory"},
      {Errc::state_error, 11, "state_error"},
      {Errc::internal, 12, "internal"},
  };
  for (const Case& c : cases) {
    CHECK(static_cast<int>(c.code) == c.number);
    CHECK(mole::name(c.code) == c.name);
  }
  static_assert(mole::name(Errc::internal) == "internal");
}

TEST_CASE("fail joins its parts into one message") {
  const std::string name = "gate";
  const auto error = caught([&] {
    mole::fail(Errc::shape_mismatch, name, ": expected [", std::int64_t{-3}, ", ", std::size_t{512},
               "], got ", std::string_view("none"));
  });
  CHECK(error.code() == Errc::shape_mismatch);
  CHECK(std::string(error.what()) == "gate: expected [-3, 512], got none");
}

TEST_CASE("numbers in a message read back as the same value") {
  const auto message = [](auto value) {
    return std::string(caught([&] { mole::fail(Errc::config_error, value); }).what());
  };
  CHECK(message(0.5) == "0.5");
  CHECK(message(0.1f) == "0.1");
  CHECK(message(-1e-9) == "-1e-09");
  CHECK(message(1e300) == "1e+300");
  CHECK(message(INT64_MIN) == "-9223372036854775808");
  CHECK(message(UINT64_MAX) == "18446744073709551615");
}

TEST_CASE("an Error is a runtime_error") {
  CHECK_THROWS_AS(mole::fail(Errc::io_error, "disk"), std::runtime_error);
  CHECK_THROWS_WITH(mole::fail(Errc::io_error, "disk"), "disk");
}

TEST_CASE("require joins its parts only when it fails") {
  int uses = 0;
  CHECK_NOTHROW(mole::require(true, Errc::invalid_argument, Costly{uses}));
  CHECK(uses == 0);
  CHECK_THROWS_WITH(mole::require(false, Errc::invalid_argument, "too ", Costly{uses}),
                    "too costly");
  CHECK(uses == 1);
}
