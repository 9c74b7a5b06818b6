package caclient

import (
	"context"
	"errors"
	"fmt"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	nodev1 "github.com/signet-id/signet/api/signet/node/v1"
)

// MaxBatch is the most items that one IssueX509SVIDs call carries.
const MaxBatch = 500

// An IssueItem asks for an X509-SVID of a registration entry for a public key.
type IssueItem struct {
	EntryID string
	// PublicKey is PKIX DER.
	PublicKey []byte
	// CSR makes the PKCS#10 request for the same key, DER. It is called for servers that want one: SPIRE's.
	CSR func() ([]byte, error)
}

// Issued is the answer to one IssueItem.
type Issued struct {
	// Err says why there is no SVID; then the other fields are empty.
	Err error
	// Chain is the X509-SVID, leaf first, each DER, without the root.
	Chain [][]byte
	// EntryRevision is that of the entry from which the SVID was built.
	EntryRevision int64
}

// IssueX509 asks for all items, in batches of at most MaxBatch that are halved after an error which a smaller batch may
// avoid, and doubled again after a success. The results are positional; each item fails or succeeds for itself.
func (c *Client) IssueX509(ctx context.Context, items []IssueItem) []Issued {
	results := make([]Issued, 0, len(items))
	for len(items) > 0 {
		n := min(int(c.batch.Load()), len(items))
		got, err := c.issueBatch(ctx, items[:n])
		switch {
		case err == nil:
			c.batch.Store(int64(min(2*max(n, 1), MaxBatch)))
			results = append(results, got...)
			items = items[n:]
		case n > 1 && smallerMayHelp(err):
			c.batch.Store(int64(n / 2))
		default:
			for range items {
				results = append(results, Issued{Err: err})
			}
			return results
		}
	}
	return results
}

func (c *Client) issueBatch(ctx context.Context, items []IssueItem) ([]Issued, error) {
	s, release, err := c.use()
	if err != nil {
		return nil, err
	}
	defer release()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if !s.spire.Load() {
		results, err := issueByKey(ctx, s, items)
		if status.Code(err) != codes.Unimplemented {
			return results, fromStatus(err)
		}
	}
	results, err := c.issueByCSR(ctx, s, items)
	return results, fromStatus(err)
}

// issueByKey asks a CA of signet.
func issueByKey(ctx context.Context, s *session, items []IssueItem) ([]Issued, error) {
	request := &nodev1.IssueX509SVIDsRequest{Items: make([]*nodev1.IssueX509SVIDsRequest_Item, len(items))}
	for i, item := range items {
		request.Items[i] = &nodev1.IssueX509SVIDsRequest_Item{EntryId: item.EntryID, PublicKey: item.PublicKey}
	}
	response, err := nodev1.NewNodeClient(s.conn).IssueX509SVIDs(ctx, request)
	if err != nil {
		return nil, err
	}
	if got := len(response.GetResults()); got != len(items) {
		return nil, fmt.Errorf("the CA answered %d items with %d results", len(items), got)
	}
	results := make([]Issued, len(items))
	for i, r := range response.GetResults() {
		switch {
		case r.GetCode() != int32(codes.OK):
			results[i].Err = status.Error(codes.Code(uint32(r.GetCode())), r.GetMessage())
		case len(r.GetCertChain()) == 0:
			results[i].Err = errors.New("the CA answered without an SVID")
		default:
			results[i] = Issued{Chain: r.GetCertChain(), EntryRevision: r.GetEntryRevision()}
		}
	}
	return results, nil
}

// smallerMayHelp tells a batch that was too much from a CA that is away or refuses this agent.
func smallerMayHelp(err error) bool {
	switch status.Code(err) {
	case codes.ResourceExhausted, codes.DeadlineExceeded, codes.Internal, codes.InvalidArgument:
		return true
	}
	return false
}

// RenewAgent asks for a new X509-SVID of the agent itself. It becomes the current one with its first use, until then the
// old one stays valid. The chain is leaf first, each DER.
func (c *Client) RenewAgent(ctx context.Context, csr []byte) ([][]byte, error) {
	s, release, err := c.use()
	if err != nil {
		return nil, err
	}
	defer release()
	if s.svid != c.config.Identity() {
		// The SVID that came last must be used before another is asked for: the CA keeps one that waits for its first
		// use, and a second one would take its place after the agent has saved the first.
		return nil, fmt.Errorf("%w with the agent's present SVID yet", ErrUnreachable)
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	response, err := agentv1.NewAgentClient(s.conn).RenewAgent(ctx, &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr}})
	if err != nil {
		return nil, fromStatus(err)
	}
	if len(response.GetSvid().GetCertChain()) == 0 {
		return nil, errors.New("the CA answered without an SVID")
	}
	return response.GetSvid().GetCertChain(), nil
}
