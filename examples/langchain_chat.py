"""LangChain over ``qlora-infer serve``: an adapter is a model's name.

pip install langchain-openai
export OPENAI_API_KEY=a-client-s-secret
python examples/langchain_chat.py http://127.0.0.1:8000/v1 pirate
"""

import sys

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

base_url, adapter = sys.argv[1:]
prompt = ChatPromptTemplate.from_template("What is the capital of {country}?")
chain = prompt | ChatOpenAI(base_url=base_url, model=adapter, temperature=0.0, max_tokens=24) | StrOutputParser()

print(chain.batch([{"country": "Italy"}, {"country": "Japan"}]))  # at the same time, in one batch of the engine
for text in chain.stream({"country": "Spain"}):
    print(text, end="", flush=True)
print()
