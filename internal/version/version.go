// Package version says what this build of signet is.
package version

import (
	"runtime"
	"runtime/debug"
)

// version and commit are set by the release build through -ldflags -X.
var (
	version = "dev"
	commit  = ""
)

// SpecRevision is the commit of the SPIFFE specifications that this build implements. [STAB-02]
const SpecRevision = "665a28f3253ecdce59f26f3ef29c0d6408b37c3d"

// String returns the version alone, such as 0.1.0 or dev.
func String() string { return version }

// Info describes the build.
type Info struct {
	Version  string `json:"version" yaml:"version"`
	Commit   string `json:"commit,omitempty" yaml:"commit,omitempty"`
	Go       string `json:"go" yaml:"go"`
	Platform string `json:"platform" yaml:"platform"`
}

// Get returns what is known of this build. The commit comes from the release build or from the Go toolchain's stamp.
func Get() Info {
	i := Info{Version: version, Commit: commit, Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
	if i.Commit == "" {
		if b, ok := debug.ReadBuildInfo(); ok {
			for _, s := range b.Settings {
				if s.Key == "vcs.revision" {
					i.Commit = s.Value
				}
			}
		}
	}
	return i
}
