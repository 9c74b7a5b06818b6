// Command gendoc writes docs/reference/cli.md from the command tree: go run ./internal/cli/gendoc > docs/reference/cli.md.
package main

import (
	"fmt"
	"os"

	"github.com/signet-id/signet/internal/cli"
)

func main() {
	if err := cli.WriteReference(os.Stdout); err != nil {
		fmt.Fprintf(os.Stderr, "gendoc: error: %v\n", err)
		os.Exit(1)
	}
}
