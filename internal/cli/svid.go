package cli

import "github.com/spf13/cobra"

func (a *app) svidCommand() *cobra.Command {
	return a.noun("svid", "SVIDs: fetch, mint, inspect, verify", "",
		a.noun("fetch", "Fetch SVIDs from the Workload API, as a workload would", "", a.fetchX509Command(), a.fetchJWTCommand(), a.fetchWITCommand()),
		a.noun("mint", "Have the CA sign an SVID without an agent, as an admin", "", a.mintX509Command(), a.mintJWTCommand(), a.mintWITCommand()),
		a.inspectCommand(), a.verifyCommand())
}
