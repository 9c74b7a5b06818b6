package cli

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/signet-id/signet/internal/version"
)

type versionInfo struct {
	version.Info
	Specs []specInfo `json:"specs,omitempty"`
}

type specInfo struct {
	Name     string `json:"name"`
	Status   string `json:"status"`
	Revision string `json:"revision"`
	Use      string `json:"use"`
}

func specs() []specInfo {
	out := []specInfo{
		{Name: "SPIFFE-ID", Status: "stable", Use: "on"},
		{Name: "X509-SVID", Status: "stable", Use: "on"},
		{Name: "JWT-SVID", Status: "stable", Use: "on"},
		{Name: "SPIFFE_Workload_Endpoint", Status: "stable", Use: "on"},
		{Name: "SPIFFE_Workload_API", Status: "stable", Use: "on"},
		{Name: "SPIFFE_Trust_Domain_and_Bundle", Status: "stable", Use: "on"},
	}
	for i := range out {
		out[i].Revision = version.SpecRevision
	}
	return out
}

func (a *app) versionCommand() *cobra.Command {
	var withSpecs bool
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print version, commit and platform",
		Long: `Print version, commit and platform of this program. With --specs also the SPIFFE specifications it follows, each with
its stability and the commit of github.com/spiffe/spiffe that was implemented.`,
		Example: `  signet version
  signet version --specs -o json`,
	}
	output := outputFlag(cmd)
	cmd.Flags().BoolVar(&withSpecs, "specs", false, "also print the specifications that are implemented")
	cmd.RunE = func(*cobra.Command, []string) error {
		v := versionInfo{Info: version.Get()}
		if withSpecs {
			v.Specs = specs()
		}
		if *output == formatJSON || *output == formatYAML {
			return a.show(*output, v, nil)
		}
		commit := v.Commit
		if commit == "" {
			commit = "unknown"
		}
		fmt.Fprintf(a.stdout, "signet %s (commit %s, %s, %s)\n", v.Version, commit, v.Go, v.Platform)
		if !withSpecs {
			return nil
		}
		return list(a, *output, "", []column[specInfo]{
			{name: "SPECIFICATION", value: func(s specInfo) string { return s.Name }},
			{name: "STATUS", value: func(s specInfo) string { return s.Status }},
			{name: "USE", value: func(s specInfo) string { return s.Use }},
			{name: "REVISION", value: func(s specInfo) string { return s.Revision }},
		}, v.Specs)
	}
	return cmd
}
