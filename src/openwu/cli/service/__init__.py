"""Start the service: `openwu serve` over HTTP, `openwu mcp` for an agent over standard input and output."""
