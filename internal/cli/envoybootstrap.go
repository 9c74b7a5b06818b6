package cli

import (
	"bytes"
	"strconv"
	"text/template"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// An envoyBootstrap is what a bootstrap is made of.
type envoyBootstrap struct {
	Service       spiffeid.ID
	Socket        string
	Context       string // the validation context for callers
	Allow         []envoyMatch
	Listen, Local envoyEndpoint
	Upstreams     []envoyUpstream
}

func (b envoyBootstrap) render() ([]byte, error) {
	var out bytes.Buffer
	err := envoyTemplate.Execute(&out, b)
	return out.Bytes(), err
}

// envoyTemplate writes every value that comes from elsewhere as a quoted string, of which YAML takes each that JSON does.
var envoyTemplate = template.Must(template.New("bootstrap").Funcs(template.FuncMap{"q": strconv.QuoteToASCII}).Parse(`# An Envoy beside {{.Service}}, by signet envoy config.
# Its certificate and the bundles come from the agent, which finds out by itself who this Envoy is: a registration entry
# must give {{.Service}} to the process.
node:
  id: {{q .Service.String}}
  cluster: {{q .Service.Path}}
static_resources:
  listeners:
  # Callers come in here. Who is not named below is refused in the handshake.
  - name: inbound
    address: {socket_address: {address: {{q .Listen.Host}}, port_value: {{.Listen.Port}}}}
    filter_chains:
    - transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          # A session that is resumed would not be asked again who it is.
          disable_stateless_session_resumption: true
          disable_stateful_session_resumption: true
          common_tls_context:
            tls_params: {tls_minimum_protocol_version: TLSv1_2}
            tls_certificate_sds_secret_configs:
            - {{template "secret" q .Service.String}}
            combined_validation_context:
              default_validation_context:
                match_typed_subject_alt_names:{{range .Allow}}
                - {san_type: URI, matcher: { {{- .Kind}}: {{q .Value}}}}{{end}}
              validation_context_sds_secret_config:
                {{template "secret" q .Context}}
      filters:
      - name: envoy.filters.network.tcp_proxy
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: inbound
          cluster: local_service
{{- range .Upstreams}}
  # What the service sends here goes to {{.ID}}.
  - name: {{.Name}}
    address: {socket_address: {address: {{q .Listen.Host}}, port_value: {{.Listen.Port}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.tcp_proxy
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: {{.Name}}
          cluster: {{.Name}}
{{- end}}
  clusters:
  - name: local_service
    type: {{if .Local.IsName}}STRICT_DNS{{else}}STATIC{{end}}
    connect_timeout: 5s
    load_assignment:
      cluster_name: local_service
      endpoints:
      - lb_endpoints:
        - endpoint: {address: {socket_address: {address: {{q .Local.Host}}, port_value: {{.Local.Port}}}}}
{{- $service := .Service.String}}
{{- range .Upstreams}}
  - name: {{.Name}}
    type: {{if .Remote.IsName}}STRICT_DNS{{else}}STATIC{{end}}
    connect_timeout: 5s
    load_assignment:
      cluster_name: {{.Name}}
      endpoints:
      - lb_endpoints:
        - endpoint: {address: {socket_address: {address: {{q .Remote.Host}}, port_value: {{.Remote.Port}}}}}
    transport_socket:
      name: envoy.transport_sockets.tls
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        common_tls_context:
          tls_params: {tls_minimum_protocol_version: TLSv1_2}
          tls_certificate_sds_secret_configs:
          - {{template "secret" q $service}}
          combined_validation_context:
            default_validation_context:
              match_typed_subject_alt_names:
              - {san_type: URI, matcher: {exact: {{q .ID.String}}}}
            validation_context_sds_secret_config:
              {{template "secret" q .ID.TrustDomain.IDString}}
{{- end}}
  # The agent of this node.
  - name: signet_agent
    type: STATIC
    connect_timeout: 5s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {}}
    load_assignment:
      cluster_name: signet_agent
      endpoints:
      - lb_endpoints:
        - endpoint: {address: {pipe: {path: {{q .Socket}}}}}
{{- define "secret"}}{name: {{.}}, sds_config: {resource_api_version: V3, api_config_source: {api_type: GRPC, transport_api_version: V3, grpc_services: [{envoy_grpc: {cluster_name: signet_agent}}]}}}{{end}}
`))
