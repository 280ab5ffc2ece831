// SPDX-License-Identifier: Apache-2.0
// A folder that takes its place all at once.
#pragma once

#include <string>
#include <vector>

#include "io/directory.hpp"
#include "mole/core/config.hpp"

namespace mole::inline MOLE_ABI {
namespace io {

/// Files are written into `path()`, a new folder beside the target; `commit` renames it. Without a
/// commit the new folder goes away and nothing has changed. Folders above the target are made. A
/// target that exists keeps its permissions and, as far as the system allows it, its owner.
/// Throws io_error with path, operation and the system's reason, for a mount point too, which
/// cannot be renamed; state_error for a target that is not empty, unless `overwrite`, and for the
/// current directory, from which all relative paths start; invalid_argument for a path with a NUL.
class NewFolder {
 public:
  NewFolder(const std::string& target, bool overwrite);
  ~NewFolder();
  NewFolder(const NewFolder&) = delete;
  NewFolder& operator=(const NewFolder&) = delete;

  const std::string& path() const noexcept { return temporary_; }

  /// Once, at the end. Of a folder that is replaced, the named files go, everything else moves
  /// along, over nothing that has the same name. If that fails, the new folder is in place and the
  /// message says where the rest is. A process that is killed in between leaves the rest in the
  /// hidden folder beside the target.
  void commit(const std::vector<std::string>& replaced);

 private:
  void make();
  void exchange();
  void move_along(const std::vector<std::string>& replaced);

  std::string parent_, target_, temporary_, aside_;
  Directory old_, new_;  // open all the time: to tidy up, nothing has to be allocated
  bool replaces_ = false;
  bool committed_ = false;
};

}  // namespace io
}  // namespace mole::inline MOLE_ABI
