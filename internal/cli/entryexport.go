package cli

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/spf13/cobra"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/encoding/protojson"
)

func (a *app) entryExportCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "export",
		Short: "Write all registration entries as JSON that 'entry import' reads",
		Long: `Write all registration entries, whole, in the JSON of SPIRE's command line (spire-server entry show -output json), for
'signet entry import' or for keeping. --socket may name the admin socket of a SPIRE server.`,
		Example: `  signet entry export > entries.json
  signet entry export --socket /tmp/spire-server/private/api.sock > entries.json`,
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return a.withCA(cmd.Context(), func(ctx context.Context, c *caConn) error {
			n := 0
			fmt.Fprint(a.stdout, `{"entries":[`)
			if err := eachEntry(ctx, c, func(e *types.Entry) error {
				text, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(e)
				if err != nil {
					return fmt.Errorf("writing registration entry %q: %w", e.GetId(), err)
				}
				if text, err = steadyJSON(text); err != nil {
					return fmt.Errorf("writing registration entry %q: %w", e.GetId(), err)
				}
				if n++; n > 1 {
					fmt.Fprint(a.stdout, ",")
				}
				_, err = fmt.Fprintf(a.stdout, "\n%s", text)
				return err
			}); err != nil {
				return err
			}
			a.note("%s written", entries(n))
			_, err := fmt.Fprintln(a.stdout, "\n]}")
			return err
		})
	}
	return a.reachesCA(cmd)
}

// eachEntry calls do with every registration entry.
func eachEntry(ctx context.Context, c *caConn, do func(*types.Entry) error) error {
	for token := ""; ; {
		page, err := entryv1.NewEntryClient(c).ListEntries(ctx, &entryv1.ListEntriesRequest{PageSize: entryPage, PageToken: token})
		if err != nil {
			return caError("reading the registration entries", c, err)
		}
		for _, e := range page.GetEntries() {
			if err := do(e); err != nil {
				return err
			}
		}
		if token = page.GetNextPageToken(); token == "" {
			return nil
		}
	}
}

func entries(n int) string {
	if n == 1 {
		return "1 registration entry"
	}
	return fmt.Sprintf("%d registration entries", n)
}

// steadyJSON takes away white space, which protojson varies on purpose: a file that is compared with another must not.
func steadyJSON(text []byte) ([]byte, error) { return json.Marshal(json.RawMessage(text)) }
