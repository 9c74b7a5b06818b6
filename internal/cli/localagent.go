package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	agentv1 "github.com/signet-id/signet/api/signet/agent/v1"
)

const (
	envAgentSocket     = "SIGNET_AGENT_SOCKET"
	defaultAgentSocket = "/run/signet-agent/admin.sock" // agent.DefaultAdminSocket, which a test compares
)

// A localAgent is a connection to the admin socket of this node's agent.
type localAgent struct {
	agentv1.AgentClient
	conn *grpc.ClientConn
	path string
}

// agentSocket is the path of the agent's admin socket: the flag's, else the environment's, else the default.
func agentSocket(flag string) string {
	path := cmp.Or(flag, os.Getenv(envAgentSocket), defaultAgentSocket)
	return strings.TrimPrefix(strings.TrimPrefix(path, "unix://"), "unix:")
}

// dialAgent connects to the agent of this node. The socket is opened once beforehand, since gRPC tells only as text why
// that does not work.
func dialAgent(ctx context.Context, path string) (*localAgent, error) {
	probe, err := (&net.Dialer{Timeout: 10 * time.Second}).DialContext(ctx, "unix", path)
	if err != nil {
		return nil, agentUnreachable(path, err)
	}
	probe.Close()
	conn, err := grpc.NewClient("passthrough:///signet-agent",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)),
		grpc.WithDisableServiceConfig(),
	)
	if err != nil {
		return nil, fmt.Errorf("connecting to the agent at %q: %w", path, err)
	}
	return &localAgent{AgentClient: agentv1.NewAgentClient(conn), conn: conn, path: path}, nil
}

// Close ends the connection.
func (l *localAgent) Close() { l.conn.Close() }

// agentUnreachable explains why there is no connection to the agent's admin socket.
func agentUnreachable(path string, cause error) error {
	err := fmt.Errorf("the agent's admin socket %q cannot be reached: %w", path, cause)
	switch {
	case errors.Is(cause, fs.ErrNotExist):
		return withHint(err, "is the agent running on this node, and is admin_socket.path set in its configuration? --socket or $%s names another socket", envAgentSocket)
	case errors.Is(cause, syscall.ECONNREFUSED):
		return withHint(err, "the socket is left over from an agent that no longer runs: start it with 'signet agent run --config FILE'")
	case errors.Is(cause, fs.ErrPermission):
		return withHint(err, "run this as root, as the agent's own user, or as a user of admin_socket in the agent's configuration")
	case errors.Is(cause, syscall.ENOTSOCK), errors.Is(cause, syscall.EPROTOTYPE):
		return withHint(err, "that file is not a socket that takes connections: name the agent's admin socket with --socket or $%s", envAgentSocket)
	}
	return err
}

// agentError explains an answer of the agent.
func agentError(doing string, err error) error {
	if err == nil {
		return nil
	}
	st, ok := status.FromError(err)
	if !ok {
		return fmt.Errorf("%s: %w", doing, err)
	}
	said := &remoteError{doing: doing, code: st.Code(), message: st.Message()}
	switch st.Code() {
	case codes.Unimplemented:
		return withHint(said, "what listens there is not the admin socket of a signet agent, or an older one: socket_path is another socket than admin_socket.path")
	case codes.InvalidArgument:
		return withHint(said, "what listens there is the Workload API: name the agent's admin socket with --socket or $%s", envAgentSocket)
	case codes.PermissionDenied:
		return withHint(said, "run this as root, as the agent's own user, or as a user of admin_socket in the agent's configuration")
	case codes.DeadlineExceeded:
		return withHint(said, "the agent did not answer in time; --timeout sets how long to wait")
	}
	return said
}

// An agentState is what the agent of this node says of itself.
type agentState struct {
	State       string            `json:"state"`
	Detail      string            `json:"detail,omitempty"`
	NotReady    string            `json:"not_ready,omitempty"`
	ID          string            `json:"id,omitempty"`
	NotAfter    string            `json:"not_after,omitempty"`
	TrustDomain string            `json:"trust_domain"`
	Attestor    string            `json:"attestor"`
	CA          agentStateCA      `json:"ca"`
	Epoch       string            `json:"epoch,omitempty"`
	Revision    int64             `json:"revision"`
	Entries     int64             `json:"entries"`
	X509SVIDs   int64             `json:"x509_svids"`
	JWTSVIDs    int64             `json:"jwt_svids"`
	Streams     int64             `json:"streams"`
	Socket      string            `json:"socket_path"`
	Serving     bool              `json:"serving"`
	Attestors   []agentAttestor   `json:"workload_attestors"`
	Sealed      *agentSealedCache `json:"sealed_cache,omitempty"`
	Version     string            `json:"version,omitempty"`
	StartedAt   string            `json:"started_at,omitempty"`
	Now         string            `json:"now,omitempty"`
}

type agentStateCA struct {
	Address   string `json:"address"`
	Connected bool   `json:"connected"`
	Since     string `json:"since,omitempty"`
	Error     string `json:"error,omitempty"`
	Server    string `json:"server,omitempty"`
}

type agentAttestor struct {
	Name        string `json:"name"`
	Unavailable string `json:"unavailable,omitempty"`
	Asked       int64  `json:"asked"`
	Incomplete  int64  `json:"incomplete"`
	LastError   string `json:"last_error,omitempty"`
	LastPID     int32  `json:"last_error_pid,omitempty"`
	LastAt      string `json:"last_error_at,omitempty"`
}

type agentSealedCache struct {
	Key         string `json:"key"`
	Error       string `json:"error,omitempty"`
	RestoredAt  string `json:"restored_at,omitempty"`
	LastContact string `json:"last_contact,omitempty"`
}

func agentStateOf(m *agentv1.GetStatusResponse) agentState {
	s := agentState{State: m.GetState(), Detail: m.GetDetail(), NotReady: m.GetNotReady(), ID: m.GetId(), NotAfter: stampOf(m.GetNotAfter()), TrustDomain: m.GetTrustDomain(),
		Attestor: m.GetAttestor(), Epoch: m.GetEpoch(), Revision: m.GetRevision(), Entries: m.GetEntries(), X509SVIDs: m.GetX509Svids(), JWTSVIDs: m.GetJwtSvids(),
		Streams: m.GetStreams(), Socket: m.GetSocketPath(), Serving: m.GetServing(), Version: m.GetVersion(), StartedAt: stampOf(m.GetStartedAt()), Now: stampOf(m.GetNow()),
		CA:        agentStateCA{Address: m.GetCa().GetAddress(), Connected: m.GetCa().GetConnected(), Since: stampOf(m.GetCa().GetSince()), Error: m.GetCa().GetError(), Server: m.GetCa().GetServer()},
		Attestors: []agentAttestor{}}
	for _, at := range m.GetAttestors() {
		s.Attestors = append(s.Attestors, agentAttestor{Name: at.GetName(), Unavailable: at.GetUnavailable(), Asked: at.GetAsked(), Incomplete: at.GetIncomplete(),
			LastError: at.GetLastError(), LastPID: at.GetLastErrorPid(), LastAt: stampOf(at.GetLastErrorAt())})
	}
	if c := m.GetSealedCache(); c != nil {
		s.Sealed = &agentSealedCache{Key: c.GetKey(), Error: c.GetError(), RestoredAt: stampOf(c.GetRestoredAt()), LastContact: stampOf(c.GetLastContact())}
	}
	return s
}

// showAgentState asks the agent of this node and prints what it says.
func (a *app) showAgentState(ctx context.Context, f format, path string) error {
	l, err := dialAgent(ctx, path)
	if err != nil {
		return err
	}
	defer l.Close()
	m, err := l.GetStatus(ctx, &agentv1.GetStatusRequest{})
	if err != nil {
		return agentError(fmt.Sprintf("asking the agent at %q how it is", path), err)
	}
	return a.printAgentState(f, m)
}

func (a *app) printAgentState(f format, m *agentv1.GetStatusResponse) error {
	s, now := agentStateOf(m), a.now()
	color := green
	switch {
	case s.State == "banned" || s.State == "refused":
		color = red
	case s.State != "in sync" || s.NotReady != "":
		color = yellow
	}
	fields := []field{
		{name: "State", value: s.State, color: color},
		{name: "Detail", value: s.Detail},
		{name: "Not ready", value: s.NotReady, color: yellow},
		{name: "Agent", value: cmp.Or(s.ID, "not attested yet")},
		{name: "Attested by", value: s.Attestor},
	}
	if s.NotAfter != "" {
		fields = append(fields, field{name: "SVID valid until", value: fmt.Sprintf("%s (%s)", s.NotAfter, left(m.GetNotAfter().AsTime(), now))})
	}
	contact := s.CA.Address + ", "
	switch {
	case s.CA.Connected:
		contact += "connected"
	case s.CA.Since != "":
		contact += "no contact"
	default:
		contact += "no contact since the agent started"
	}
	if s.CA.Since != "" {
		contact += fmt.Sprintf(" since %s (%s)", s.CA.Since, approximate(max(0, now.Sub(m.GetCa().GetSince().AsTime()))))
	}
	if s.CA.Server == "spire" {
		contact += "; a SPIRE server: polled, and without call policies"
	}
	held := "nothing yet"
	if s.Revision > 0 {
		held = fmt.Sprintf("revision %d of epoch %s: %d entries", s.Revision, s.Epoch, s.Entries)
	}
	answers := "answers"
	if !s.Serving {
		answers = "does not answer"
	}
	fields = append(fields,
		field{name: "CA", value: contact},
		field{name: "CA error", value: s.CA.Error, color: yellow},
		field{name: "Holds", value: held},
		field{name: "SVIDs", value: fmt.Sprintf("%d X.509, %d JWT", s.X509SVIDs, s.JWTSVIDs)},
		field{name: "Workload API", value: fmt.Sprintf("%s, %s; %d subscriptions", s.Socket, answers, s.Streams)})
	for _, at := range s.Attestors {
		text, color := at.Name, green
		if at.Unavailable != "" {
			text, color = text+": "+at.Unavailable, red
		} else if at.Incomplete > 0 {
			text, color = fmt.Sprintf("%s: incomplete for %d of %d processes, last at %s for process %d: %s", text, at.Incomplete, at.Asked, at.LastAt, at.LastPID, at.LastError), yellow
		}
		fields = append(fields, field{name: "Attestor", value: text, color: color})
	}
	if c := s.Sealed; c != nil {
		text := "sealed by " + c.Key
		if c.RestoredAt != "" {
			text += fmt.Sprintf("; what is held was restored from it at %s, and the CA was there last at %s", c.RestoredAt, cmp.Or(c.LastContact, "a time unknown"))
		}
		fields = append(fields, field{name: "Sealed cache", value: text}, field{name: "Cache error", value: c.Error, color: red})
	}
	return a.show(f, s, append(fields, field{name: "Version", value: s.Version}, field{name: "Started", value: s.StartedAt}))
}

// agentOrCA decides whom "signet agent status" asks: the agent of this node, unless an agent is named or the CA is.
//
// With --socket both are possible, and the socket itself says which it is.
func (a *app) agentOrCA(cmd *cobra.Command, args []string, f format, fromCA func() error) error {
	if a.ca.timeout <= 0 {
		return usagef("--timeout %s is not a positive duration, such as 30s", a.ca.timeout)
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), a.ca.timeout)
	defer cancel()
	local := os.Getenv(envAgentSocket)
	switch {
	case len(args) > 0 || a.ca.server != "":
		return fromCA()
	case a.ca.socket != "":
		err := a.showAgentState(ctx, f, agentSocket(a.ca.socket))
		if isCode(err, codes.Unimplemented) {
			return fromCA()
		}
		return err
	case local == "" && os.Getenv(envCASocket) != "":
		return fromCA()
	case local == "":
		if _, err := os.Stat(defaultAgentSocket); errors.Is(err, fs.ErrNotExist) {
			if _, err := os.Stat(defaultCASocket); err == nil {
				return fromCA()
			}
		}
	}
	return a.showAgentState(ctx, f, agentSocket(""))
}
