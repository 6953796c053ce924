//go:build tools

// Names Dragonfly's scheduler as a dependency, for misc/dragonfly/install.sh: built this way,
// what it depends on is what go.sum holds.
package tools

import _ "d7y.io/dragonfly/v2/cmd/scheduler"
