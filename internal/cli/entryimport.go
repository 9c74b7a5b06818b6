package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/signet-id/signet/spiffe"
)

const (
	// maxImport bounds the file of entries in bytes; a million entries have about 700 MB.
	maxImport = 1 << 30
	// importBatch is how many entries go into one call.
	importBatch = 100
	// joinTokenAgents begins the paths of agents that got in by a join token. Such a token is good at the server that made
	// it, so no agent of another one ever has the ID.
	joinTokenAgents = "/spire/agent/join_token/"
)

func (a *app) entryImportCommand() *cobra.Command {
	var parents []string
	var update, dryRun bool
	cmd := &cobra.Command{
		Use:   "import FILE|-",
		Short: "Create the registration entries of a file, such as those of a SPIRE server",
		Long: `Create the registration entries in FILE, which 'signet entry export' or 'spire-server entry show -output json' wrote. Entries
keep their IDs, so the same command again creates only what is missing. An entry that is there but differs is an error, unless --update makes
it as the file has it. Entries that are not in the file stay.

The parent of an entry is an agent or a group of nodes. Agents that attest by x509pop or k8s_psat have the same IDs at every server; those that
attested by join token get new ones. --parent puts entries under another parent. What SPIRE keeps to name a join token's agent (its node
alias, with a selector spiffe_id:...) is left out when that agent is not mapped: a new token makes a new one.`,
		Example: `  spire-server entry show -output json | ssh ca signet entry import -
  signet entry import entries.json --dry-run
  signet entry import entries.json --parent /spire/agent/join_token/0c5e=/nodes/backend`,
		Args: exactArgs("FILE"),
	}
	output := outputFlag(cmd)
	cmd.Flags().StringArrayVar(&parents, "parent", nil, "OLD=NEW: entries whose parent is OLD get the parent NEW (repeatable)")
	cmd.Flags().BoolVar(&update, "update", false, "change entries that are there and differ")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "only say what would be done")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		moved, err := parentFlags(parents)
		if err != nil {
			return err
		}
		data, err := a.readInput(args[0], maxImport)
		if err != nil {
			return err
		}
		list, err := readEntries(inputName(args[0]), data)
		if err != nil {
			return err
		}
		return a.withCAUnbounded(cmd.Context(), func(ctx context.Context, c *caConn) error {
			i := &entryImport{app: a, conn: c, update: update, dryRun: dryRun}
			if err := i.plan(ctx, list, moved); err != nil {
				return err
			}
			if err := i.do(ctx); err != nil {
				return err
			}
			return i.report(*output)
		})
	}
	return a.reachesCA(cmd)
}

// parentFlags reads --parent OLD=NEW. IDs may be relative to the CA's trust domain; OLD is compared as it is written in
// the file, so it is kept as a path then.
func parentFlags(flags []string) (map[string]string, error) {
	out := map[string]string{}
	for _, f := range flags {
		before, after, ok := strings.Cut(f, "=")
		if !ok {
			return nil, &usageError{err: fmt.Errorf("--parent %q is not of the form OLD=NEW", f), hint: "for example --parent /spire/agent/join_token/0c5e=/nodes/backend"}
		}
		for _, s := range []string{before, after} {
			if strings.HasPrefix(s, "/") {
				if err := spiffeid.ValidatePath(s); err != nil {
					return nil, usagef("--parent %q: %q is not the path of a SPIFFE ID: %w", f, s, err)
				}
				continue
			}
			if _, err := fullID("--parent", s); err != nil {
				return nil, err
			}
		}
		if _, twice := out[before]; twice {
			return nil, usagef("--parent names %q twice", before)
		}
		out[before] = after
	}
	return out, nil
}

// readEntries reads one or more JSON objects {"entries": [...]}, one after another. A field that is not known is an error: what it
// means would get lost.
func readEntries(name string, data []byte) ([]*types.Entry, error) {
	var out []*types.Entry
	dec := json.NewDecoder(bytes.NewReader(data))
	for {
		var raw json.RawMessage
		if err := dec.Decode(&raw); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, fmt.Errorf("reading %q: byte %d: %w", name, dec.InputOffset(), err)
		}
		var page entryv1.ListEntriesResponse
		if err := protojson.Unmarshal(raw, &page); err != nil {
			return nil, withHint(fmt.Errorf("reading the entries in %q: %w", name, err), "'signet entry export' and 'spire-server entry show -output json' write what can be read")
		}
		out = append(out, page.GetEntries()...)
	}
	if len(out) == 0 {
		return nil, withHint(fmt.Errorf("there are no registration entries in %q", name), "'spire-server entry show -output json' writes them")
	}
	seen := map[string]bool{}
	for _, e := range out {
		if e.GetId() == "" {
			return nil, fmt.Errorf("reading the entries in %q: the entry of %s has no id", name, idString(e.GetSpiffeId()))
		}
		if seen[e.GetId()] {
			return nil, fmt.Errorf("reading the entries in %q: two entries have the id %q", name, e.GetId())
		}
		seen[e.GetId()] = true
	}
	return out, nil
}

// An entryImport is what is to be done and what was.
type entryImport struct {
	*app
	conn           *caConn
	update, dryRun bool

	create, change []*types.Entry
	unchanged      int
	leftOut        []string
	refused        []error
}

// plan compares the file's entries with those that are there.
func (i *entryImport) plan(ctx context.Context, list []*types.Entry, moved map[string]string) error {
	td, err := i.conn.ownTrustDomain(ctx)
	if err != nil {
		return err
	}
	there := map[string]*types.Entry{}
	wanted := map[string]bool{}
	for _, e := range list {
		wanted[e.GetId()] = true
	}
	if err := eachEntry(ctx, i.conn, func(e *types.Entry) error {
		if wanted[e.GetId()] {
			there[e.GetId()] = e
		}
		return nil
	}); err != nil {
		return err
	}
	orphans := map[string]int{}
	for _, e := range list {
		mapped, err := newParent(td, e.GetParentId(), moved)
		if err != nil {
			return err
		}
		e = proto.CloneOf(e)
		byToken := !mapped && strings.HasPrefix(e.GetParentId().GetPath(), joinTokenAgents)
		e.RevisionNumber, e.CreatedAt = 0, 0 // the CA's to give
		switch old := there[e.GetId()]; {
		case byToken && isAlias(e):
			i.leftOut = append(i.leftOut, fmt.Sprintf("entry %s, by which %s names an agent of a join token", e.GetId(), idString(e.GetSpiffeId())))
			continue
		case e.GetExpiresAt() > 0 && !i.now().Before(time.Unix(e.GetExpiresAt(), 0)):
			i.leftOut = append(i.leftOut, fmt.Sprintf("entry %s of %s, which ended %s", e.GetId(), idString(e.GetSpiffeId()), stamp(unixTime(e.GetExpiresAt()))))
			continue
		case old == nil:
			i.create = append(i.create, e)
		case sameEntry(old, e):
			i.unchanged++
		case i.update:
			i.change = append(i.change, e)
		default:
			i.refuse(e, fmt.Errorf("it is there already but differs (--update makes it as the file has it)"))
			continue
		}
		if byToken {
			orphans[idString(e.GetParentId())]++
		}
	}
	for _, id := range sortedKeys(orphans) {
		i.warn([]string{fmt.Sprintf("no agent will ever be %s here, the parent of %s: give --parent %s=NEW", id, entries(orphans[id]), id)})
	}
	return nil
}

// newParent maps the parent of an entry in place, if one is asked for it.
func newParent(td spiffeid.TrustDomain, parent *types.SPIFFEID, moved map[string]string) (bool, error) {
	to, ok := moved[idString(parent)]
	if !ok && parent.GetTrustDomain() == td.Name() {
		to, ok = moved[parent.GetPath()]
	}
	if !ok {
		return false, nil
	}
	if strings.HasPrefix(to, "/") {
		to = td.IDString() + to
	}
	id, err := spiffe.ParseWorkloadID(to)
	if err != nil {
		return false, usagef("--parent: %w", err)
	}
	parent.TrustDomain, parent.Path = id.TrustDomain().Name(), id.Path()
	return true, nil
}

// isAlias tells whether e names one agent, as SPIRE makes it for a join token.
func isAlias(e *types.Entry) bool {
	return len(e.GetSelectors()) == 1 && e.Selectors[0].GetType() == "spiffe_id" && e.Selectors[0].GetValue() == idString(e.GetParentId())
}

// sameEntry compares what an operator gave.
func sameEntry(a, b *types.Entry) bool {
	canonical := func(e *types.Entry) *types.Entry {
		e = proto.CloneOf(e)
		e.RevisionNumber, e.CreatedAt = 0, 0
		slices.SortFunc(e.Selectors, func(x, y *types.Selector) int {
			return strings.Compare(x.GetType()+":"+x.GetValue(), y.GetType()+":"+y.GetValue())
		})
		slices.Sort(e.FederatesWith)
		if proto.Size(e.AdditionalAttributes) == 0 {
			e.AdditionalAttributes = nil
		}
		return e
	}
	return proto.Equal(canonical(a), canonical(b))
}

func (i *entryImport) refuse(e *types.Entry, err error) {
	i.refused = append(i.refused, fmt.Errorf("entry %s of %s: %w", e.GetId(), idString(e.GetSpiffeId()), err))
}

// do writes in batches. An entry that the CA refuses does not keep the others out.
func (i *entryImport) do(ctx context.Context) error {
	if i.dryRun {
		return nil
	}
	client := entryv1.NewEntryClient(i.conn)
	var created, changed []*types.Entry
	for batch := range slices.Chunk(i.create, importBatch) {
		call, cancel := context.WithTimeout(ctx, i.ca.timeout)
		answer, err := client.BatchCreateEntry(call, &entryv1.BatchCreateEntryRequest{Entries: batch})
		cancel()
		if err != nil {
			return i.stopped(len(created)+len(changed), caError("creating registration entries", i.conn, err))
		}
		if len(answer.GetResults()) != len(batch) {
			return fmt.Errorf("creating registration entries: the CA answered with %d results, want %d", len(answer.GetResults()), len(batch))
		}
		for n, r := range answer.GetResults() {
			if i.took(batch[n], r.GetStatus(), r.GetEntry()) {
				created = append(created, batch[n])
			}
		}
	}
	for batch := range slices.Chunk(i.change, importBatch) {
		call, cancel := context.WithTimeout(ctx, i.ca.timeout)
		answer, err := client.BatchUpdateEntry(call, &entryv1.BatchUpdateEntryRequest{Entries: batch})
		cancel()
		if err != nil {
			return i.stopped(len(created)+len(changed), caError("changing registration entries", i.conn, err))
		}
		if len(answer.GetResults()) != len(batch) {
			return fmt.Errorf("changing registration entries: the CA answered with %d results, want %d", len(answer.GetResults()), len(batch))
		}
		for n, r := range answer.GetResults() {
			if i.took(batch[n], r.GetStatus(), nil) {
				changed = append(changed, batch[n])
			}
		}
	}
	i.create, i.change = created, changed
	return nil
}

func (i *entryImport) stopped(done int, err error) error {
	return fmt.Errorf("%w (%s done; the same command again goes on from there)", err, entries(done))
}

// took notes what the CA said about one entry.
func (i *entryImport) took(e *types.Entry, st *types.Status, inTheWay *types.Entry) bool {
	switch code := codes.Code(st.GetCode()); {
	case code == codes.OK:
		return true
	case code == codes.AlreadyExists && inTheWay.GetId() != "":
		i.refuse(e, fmt.Errorf("entry %s has the same SPIFFE ID, parent and selectors", inTheWay.GetId()))
	case st.GetMessage() == "":
		i.refuse(e, errors.New(code.String()))
	default:
		i.refuse(e, errors.New(st.GetMessage()))
	}
	return false
}

func (i *entryImport) report(f format) error {
	type result struct {
		Created   int      `json:"created"`
		Changed   int      `json:"changed"`
		Unchanged int      `json:"unchanged"`
		LeftOut   []string `json:"left_out,omitempty"`
		Refused   []string `json:"refused,omitempty"`
		DryRun    bool     `json:"dry_run,omitempty"`
	}
	r := result{Created: len(i.create), Changed: len(i.change), Unchanged: i.unchanged, LeftOut: i.leftOut, DryRun: i.dryRun}
	for _, err := range i.refused {
		r.Refused = append(r.Refused, err.Error())
	}
	if f == formatJSON || f == formatYAML {
		if err := i.show(f, r, nil); err != nil {
			return err
		}
	} else {
		for _, s := range i.leftOut {
			i.note("left out: %s", s)
		}
		done := [3]string{"created", "changed", "unchanged"}
		if i.dryRun {
			done = [3]string{"to create", "to change", "unchanged"}
		}
		fmt.Fprintf(i.stdout, "%d %s, %d %s, %d %s\n", r.Created, done[0], r.Changed, done[1], r.Unchanged, done[2])
	}
	if n := len(i.refused); n > 0 {
		return withHint(fmt.Errorf("%s refused:\n%w", entries(n), errors.Join(i.refused...)), "the others are in; correct what is wrong, and the same command again goes on from there")
	}
	return nil
}
